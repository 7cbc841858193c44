"""Five people pass things on: tracking of shuffled objects (BIG-bench hard's), with moves that all are even.

Every move is a cycle of three or two swaps, so that the moves generate the alternating group A5. No parity remains
to read the answer from, and no fixed number of layers follows long chains of moves. `passing?moves=4-16&names=1` makes
problems of 4 to 16 moves, with the second set of names.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from hrpo_patches.tasks.base import PASSING, Row, Task, steps, text
from hrpo_patches.tasks.worked import Worked
from hrpo_thinking.errors import InputError

# The second of each pair is for tests of what was not seen in training.
NAMES = (("Alice", "Bob", "Claire", "Dave", "Eve"), ("Frank", "Grace", "Henry", "Jane", "Tom"))
THINGS = (("ball", "book", "hat", "key", "cup"), ("coin", "pen", "ring", "box", "bag"))
CYCLES = ("{0} gives to {1}, {1} to {2}, {2} to {0}.", "{0} passes on to {1}, who passes to {2}, who passes to {0}.")
SWAPS = ("{0} and {1} swap, {2} and {3} swap.", "{0} trades with {1}, and {2} trades with {3}.")
STEPS = ("holder", "all")
OPTIONS = {  # and the values of each
    "moves": "N or N-M, two numbers from 1 on, the smaller one first",
    "names": "0 or 1",
    "things": "0 or 1",
    "phrasing": "0 or 1",
    "step": " or ".join(STEPS),
    "asked": "a number from 0 to 4",
}


@dataclass(frozen=True)
class Passing(Task):
    """The task; its problems come with their steps.

    Attributes:
        moves: the fewest and the most moves of a problem.
        names, things, phrasing: 0, those of training; 1, others.
        step: what a step writes: "holder", who has the thing that is asked about, or "all", who has what.
        asked: the thing that is asked about, 0 to 4; None for any.
        size, seed: how many problems, and their seed.
    """

    moves: tuple[int, int] = (4, 8)
    names: int = 0
    things: int = 0
    phrasing: int = 0
    step: str = "holder"
    asked: int | None = None
    size: int = 10_000
    seed: int = 42

    def generated(self, split: str) -> list[Any]:
        """All problems, with their steps."""
        generator = random.Random(f"{self.seed} {split}")
        return [self._one(generator) for _ in range(self.size)]

    def _one(self, generator: random.Random) -> Worked:
        names, things = NAMES[self.names], THINGS[self.things]
        holder = list(names)
        generator.shuffle(holder)  # by thing
        asked = self.asked if self.asked is not None else generator.randrange(5)
        lines = [
            "At the start, " + ", ".join(f"{who} has the {it}" for who, it in zip(holder, things, strict=True)) + "."
        ]
        written = []
        for move in range(1, generator.randint(*self.moves) + 1):
            cycle = generator.random() < 20 / 35  # A5 has 20 cycles of three, and 15 pairs of swaps
            who = generator.sample(names, 3 if cycle else 4)
            to = {who[0]: who[1], who[1]: who[2], who[2]: who[0]} if cycle else _swaps(who)
            lines.append(f"{move}. {(CYCLES if cycle else SWAPS)[self.phrasing].format(*who)}")
            holder = [to.get(person, person) for person in holder]
            if self.step == "holder":
                written.append(f"{holder[asked]} has the {things[asked]} after move {move}.")
            else:
                rest = ", ".join(f"{person} the {thing}" for person, thing in zip(holder, things, strict=True))
                written.append(f"After move {move}: {rest}.")
        lines.append(f"Who has the {things[asked]} at the end?")
        return {"question": "\n".join(lines), "answer": [holder[asked]], "steps": written}


def _swaps(who: list[str]) -> dict[str, str]:
    return {who[0]: who[1], who[1]: who[0], who[2]: who[3], who[3]: who[2]}


def _read(row: Row) -> Any:
    return {"question": text(row, "question"), "answer": [str(row["answer"]).strip()]}


def same_name(gold: str, answer: str) -> bool:
    """Whether an answer is the gold name, with or without a full stop."""
    return answer.strip().rstrip(".").casefold() == gold.casefold()


def _value(option: str, text: str) -> int | str | tuple[int, int] | None:
    """An option's value in a task's name; None if it cannot have this one."""
    if option == "step":
        return text if text in STEPS else None
    if option == "moves":
        pair = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
        fewest, most = (int(pair[1]), int(pair[2] or pair[1])) if pair else (0, 0)
        return (fewest, most) if 1 <= fewest <= most else None
    return int(text) if text in list("01234" if option == "asked" else "01") else None


def passing(name: str, size: int, seed: int) -> Passing:
    """The task `passing?option=value&...`, with `size` problems.

    Raises:
        InputError: the option is unknown, or cannot have this value.
    """
    options: dict[str, Any] = {}
    for option, value in parse_qsl(name.partition("?")[2], keep_blank_values=True):
        if option not in OPTIONS:
            raise InputError(f"--task {name}: unknown option {option!r}; the options are {', '.join(OPTIONS)}.")
        if (read := _value(option, value)) is None:
            raise InputError(f"--task {name}: {option} must be {OPTIONS[option]}, not {value!r}.")
        options[option] = read
    return Passing(
        name=PASSING,
        train=(),
        test=(),
        shapes={("question", "answer"): _read},
        instruction=steps("Eve", answer="the name alone"),
        examples=(),
        grader=same_name,
        size=size,
        seed=seed,
        **options,
    )
