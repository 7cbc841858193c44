"""Problems with their gold answers, and prompts that ask for the marker; knows rows and text, no models.

A data set is a hub id (`openai/gsm8k`, or `ID:CONFIG`), the path of a `.jsonl` file, or `reasoning_gym:NAME`, with the
generator's own options after a question mark: `reasoning_gym:basic_arithmetic?min_terms=2&max_terms=2`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml
from datasets import load_dataset

from hrpo_patches.errors import InputError

Problem = dict[str, str]

GOLD_MARKER = "####"  # of GSM8K's own answers
_GYM = "reasoning_gym:"

SYSTEM_PROMPT = (
    "Solve the problem step by step. When you are done, write {marker} and then the final answer alone, "
    "like this: {marker} 42"
)


def gold_answer(answer: str) -> str:
    """What follows GSM8K's marker in a worked solution; the whole text where there is none."""
    return answer.rpartition(GOLD_MARKER)[2].strip()


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:  # bytes split at newlines only, not at U+2028 and its kin
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} is not JSON on line {number}: {error.msg}.") from None
            except UnicodeDecodeError:
                raise InputError(f"{path} is not UTF-8 on line {number}.") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is not a JSON object.")
            yield row | {"__line__": number}


def _checked(row: dict[str, Any], where: str) -> Problem:
    for column in ("question", "answer"):
        value = row.get(column)
        if value is None or not str(value).strip():
            has = sorted(key for key in row if key != "__line__")
            raise InputError(f"{where} has no {column!r}; it has {has}, and needs 'question' and 'answer'.")
    gold = gold_answer(str(row["answer"]))
    if not gold:
        raise InputError(f"{where} has nothing after {GOLD_MARKER} in its answer.")
    return {"question": str(row["question"]).strip(), "answer": gold}


def _from_file(path: Path) -> list[Problem]:
    if path.is_dir():
        raise InputError(f"{path} is a folder; a data file has to end in .jsonl.")
    if not path.is_file():
        raise InputError(f"the data file {path} does not exist.")
    rows = [_checked(row, f"{path} line {row['__line__']}") for row in _json_rows(path)]
    if not rows:
        raise InputError(f"the data file {path} is empty.")
    return rows


def _from_hub(name: str, split: str) -> list[Problem]:
    identifier, _, config = name.partition(":")
    config = config or ("main" if identifier == "openai/gsm8k" else "")
    try:
        data = load_dataset(identifier, config or None, split=split)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"the data set {name!r} could not be loaded ({error}); a path has to end in .jsonl."
        ) from None
    return [_checked(row, f"{name}[{split}] row {i}") for i, row in enumerate(data)]


def gym_problems(name: str, size: int, seed: int) -> list[Problem]:
    """`size` problems of a reasoning-gym generator.

    Raises:
        InputError: reasoning-gym is not installed, or does not know the name or an option.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            "reasoning_gym:... needs reasoning-gym; run: pip install 'hrpo_patches[quickstart]'"
        ) from None
    generator, _, query = name.partition("?")
    try:
        options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
        stream = reasoning_gym.create_dataset(generator, size=size, seed=seed, **options)
    except (ValueError, TypeError, AssertionError, yaml.YAMLError) as error:
        raise InputError(f"reasoning-gym cannot make {name!r}: {str(error).splitlines()[0]}.") from None
    return [_checked(row, f"{name} problem {i}") for i, row in enumerate(stream)]


def load_problems(name: str, split: str = "train", size: int = 10_000, seed: int = 42) -> list[Problem]:
    """Problems, each with a `question` and an `answer` (the gold answer alone).

    Args:
        name: a hub id, a `.jsonl` path or `reasoning_gym:NAME` (see the head of this module).
        split: of a hub data set.
        size: how many problems a generator makes; files and hub data sets are read whole.
        seed: of a generator.

    Raises:
        InputError: the data is missing, empty, no JSON (which line), or lacks a question or an answer (which row).
    """
    if name.startswith(_GYM):
        return gym_problems(name.removeprefix(_GYM), size, seed)
    if name.endswith((".jsonl", ".json")) or Path(name).exists():
        return _from_file(Path(name))
    return _from_hub(name, split)


def split_held_out(problems: list[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out): `held_out` distinct questions at random, none of which is left among the training problems.

    Raises:
        InputError: there are too few questions.
    """
    questions = sorted({problem["question"] for problem in problems})
    if held_out >= len(questions):
        raise InputError(
            f"{len(questions)} distinct questions are too few to hold {held_out} out and train on the rest."
        )
    chosen = set(random.Random(seed).sample(questions, held_out))
    by_question = {problem["question"]: problem for problem in problems}
    train = [problem for problem in problems if problem["question"] not in chosen]
    return train, [by_question[question] for question in sorted(chosen)]


def prompt_of(question: str, marker: str, examples: list[str], chat: bool) -> str | list[dict[str, str]]:
    """The prompt of one problem.

    Args:
        question: the problem.
        marker: the answer marker that the prompt asks for.
        examples: worked examples, each a question, its solution, the marker and the answer. In plain text they are the
            whole instruction.
        chat: a conversation for a chat template; else plain text, the examples and the question apart by blank lines.

    Returns:
        Messages if `chat`, else a text that the completion continues on a new line.
    """
    instruction = SYSTEM_PROMPT.format(marker=marker)
    if chat:
        system = "\n\n".join([instruction, *examples])
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return "\n\n".join([*(examples or [instruction]), question]) + "\n"


def check_examples(examples: list[str], marker: str) -> None:
    """Raise `InputError` unless every worked example carries the marker once."""
    for example in examples:
        if example.count(marker) != 1:
            raise InputError(f"a worked example has to carry the marker {marker!r} once, unlike {example!r}.")
