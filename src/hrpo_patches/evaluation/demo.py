"""Answers a question for the page of `hrpo demo`, under several controls, and writes the answers as HTML.

It knows no server: `commands/demo.py` has the page around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import zip_longest

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.evaluation.think import Thought, cells_of, think, visible
from hrpo_patches.models.hub import run_folder
from hrpo_patches.tasks.prompts import prompt_for, prompt_ids
from hrpo_patches.thinking.controls import controlled
from hrpo_thinking.errors import InputError

# Not "mean", which of two rows would be half a row's own thought.
CONDITIONS = {
    "live": "the thoughts as they are",
    "off": "thinking off: the input is the token's embedding",
    "zeroed": "the thoughts are zeros: the input is a ⊙ e",
    "swapped": "the thoughts are those of the second question",
}
PLAIN = "This is a plain model, without trained thinking modules: it answers without thoughts."
LEGEND = (
    '<p class="legend">share of the thought √(1 − a²): 0 <span></span> 1, where a is the share of the token\'s '
    "embedding in its input, the mean over the hidden size. Point at a token for its numbers.</p>"
)
CSS = """
.hrpo .columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem}
.hrpo .tokens {white-space: pre-wrap; line-height: 1.9; overflow-wrap: anywhere}
.hrpo .tokens span {padding: .15rem 0; border-radius: .2rem; box-shadow: inset 0 0 0 .5px rgb(128 128 128 / .45)}
.hrpo .legend span {display: inline-block; width: 8rem; height: .8rem; vertical-align: middle;
  background: linear-gradient(to right, rgb(234 88 12 / 0), rgb(234 88 12 / .8)); border: 1px solid gray}
.hrpo .scroll {overflow: auto; max-height: 28rem}
.hrpo table {font-size: .8rem; border-collapse: collapse; width: 100%}
.hrpo th, .hrpo td {text-align: left; padding: .1rem .5rem; border-bottom: 1px solid rgb(128 128 128 / .3)}
.hrpo pre {white-space: pre-wrap; font-size: .8rem}
.hrpo .problem {color: rgb(220 38 38)}
"""
LONGEST = 2048  # tokens of a completion on the page, each of which keeps its logits
_HEADS = ("token", "a", "√(1 − a²)", "the residual's nearest words", "entropy, nats")


@dataclass
class Run:
    """A model on the page.

    Attributes:
        name: as it was given: a folder, a hub id or "smollm2-135m".
        model, tokenizer: as `models.open_model` gives them.
        thinks: whether it has thinking weights that were trained. If not, it answers with thinking off.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    thinks: bool

    @cached_property
    def folder(self) -> str:
        """Where the run's files are; the hub is asked once."""
        return run_folder(self.name)


@dataclass
class Asking:
    """What is asked of every run, and how.

    Attributes:
        question: the question.
        second: the question whose thoughts are used under "swapped".
        conditions: of `CONDITIONS`.
        max_new_tokens, temperature, seed, top: as of `think`.
    """

    question: str
    second: str
    conditions: Sequence[str]
    max_new_tokens: int
    temperature: float
    seed: int
    top: int


def check(runs: Sequence[Run], asking: Asking) -> None:
    """Raise `InputError` unless there is something to ask, of somebody, and swapped thoughts have a donor."""
    if not asking.question.strip():
        raise InputError("the question is empty.")
    if not runs or not asking.conditions:
        raise InputError("choose at least one run and one kind of thoughts.")
    if None in (asking.max_new_tokens, asking.temperature, asking.seed):
        raise InputError("max_new_tokens, temperature and seed must be numbers.")
    if asking.max_new_tokens > LONGEST:
        raise InputError(
            f"max_new_tokens must be at most {LONGEST} here, not {asking.max_new_tokens}; hrpo think takes more."
        )
    if "swapped" in asking.conditions and asking.second.strip() in ("", asking.question.strip()):
        raise InputError("swapped thoughts need a second question, which must differ from the first.")


def answer(run: Run, asking: Asking, condition: str) -> list[Thought]:
    """One completion of a run, token by token, under one of `CONDITIONS`."""
    prompt, partner = (prompt_for(run.folder, run.tokenizer, text)[0] for text in (asking.question, asking.second))
    with controlled(run.model, condition, ("question", "second")):
        return think(
            run.model,
            run.tokenizer,
            prompt,
            asking.max_new_tokens,
            asking.temperature,
            asking.top,
            asking.seed,
            partner if condition == "swapped" else None,
        )


def answers(runs: Sequence[Run], asking: Asking) -> Iterator[str]:
    """The HTML of all completions, again after each of them; a sentence before them if the next cannot be made."""
    done = shown = ""
    try:
        check(runs, asking)
        for run in runs:
            columns, live = "", None
            head = _head_of(run, asking.question)
            for condition in asking.conditions if run.thinks else ["off"]:
                thoughts = answer(run, asking, condition)
                live = thoughts if condition == "live" else live
                columns += _column(run, condition, thoughts, live)
                shown = f'<section class="run">{head}<div class="columns">{columns}</div></section>'
                yield f'<div class="hrpo">{LEGEND}{done}{shown}</div>'
            done, shown = done + shown, ""
    except InputError as error:
        yield f'<div class="hrpo"><p class="problem">{escape(str(error))}</p>{done}{shown}</div>'


def _head_of(run: Run, question: str) -> str:
    """A run's name, whether it thinks, and the prompt as it was asked."""
    prompt, trained = prompt_for(run.folder, run.tokenizer, question)
    asked = str(run.tokenizer.decode(prompt_ids(run.tokenizer, prompt)))
    how = "the instruction of the run's report.json" if trained else "the question alone"
    plain = "" if run.thinks else f'<p class="plain">{PLAIN}</p>'
    return (
        f"<h3>{escape(run.name)}</h3>{plain}"
        f"<details><summary>Asked with {how}</summary><pre>{escape(asked)}</pre></details>"
    )


def _column(run: Run, condition: str, thoughts: list[Thought], live: list[Thought] | None) -> str:
    """One completion: its tokens, coloured, and a table of them."""
    plain = "answer" if condition != "off" else "off"
    rows, tokens = "", ""
    for thought in thoughts:
        token, a, words, entropy = cells_of(thought, plain)
        share = math.sqrt(max(0.0, 1 - thought.share**2))
        cells = (token, a, f"{share:.4f}", words, entropy)
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        hover = "\n".join(f"{head}: {cell}" for head, cell in zip(_HEADS, cells, strict=True))
        text = " ".join(visible(part) if part else "" for part in thought.token.split(" ")) or "∅"
        colour = f"background: rgb(234 88 12 / {0.8 * share:.3f})"
        tokens += f'<span style="{colour}" title="{escape(hover)}">{escape(text)}</span>'
        tokens += "\n" * text.count("⏎")
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    return (
        f'<section class="completion" data-run="{escape(run.name)}" data-thoughts="{condition}">'
        f"<h4>{condition}</h4><p>{CONDITIONS[condition]}{_difference(condition, thoughts, live)}</p>"
        f'<p class="tokens">{tokens}</p><details><summary>{len(thoughts)} tokens, one by one</summary>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>'
        "</section>"
    )


def _difference(condition: str, thoughts: list[Thought], live: list[Thought] | None) -> str:
    """Where a completion leaves that with live thoughts, if that is on the page."""
    if live is None or condition == "live":
        return ""
    pairs = zip_longest((one.token for one in thoughts), (one.token for one in live))
    first = next((number for number, (one, other) in enumerate(pairs, 1) if one != other), None)
    return "; the same tokens as live" if first is None else f"; differs from live from token {first} on"
