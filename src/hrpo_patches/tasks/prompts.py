"""The prompts that ask a task's questions."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from hrpo_patches.tasks.base import Problem, Task
from hrpo_thinking.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]
MARKER = "{marker}"  # where the answer marker goes in a task's texts
PROMPTS = ("auto", "chat", "plain")
QUESTION = "{question}"  # where the question goes in the prompt that a run's report keeps
RUN_FILE = "run.json"  # what a run was asked for, written when training begins
TEMPLATE = "asked"  # its key in that file; not one of the flags, which are the other keys
MANY = 20_000  # problems whose counting takes seconds


def examples_of(task: Task, marker: str, shots: int, own: list[str]) -> list[str]:
    """The worked examples of a prompt: the user's own, else the task's first `shots`.

    Raises:
        InputError: the task has fewer, or an example does not carry the marker once.
    """
    require(not own or not shots, "--examples and --shots are two ways to say the same; remove one.")
    require(
        0 <= shots <= len(task.examples),
        f"{task.name} has {len(task.examples)} worked examples, not {shots}; give --examples.",
    )
    chosen = own or [example.replace(MARKER, marker) for example in task.examples[:shots]]
    for example in chosen:
        require(
            example.count(marker) == 1, f"a worked example must carry the marker {marker!r} once, unlike {example!r}."
        )
    return chosen


def prompt_of(task: Task, question: str, marker: str, examples: list[str], chat: bool) -> Prompt:
    """The prompt of one problem.

    Args:
        task: says what to do.
        question: the problem.
        marker: the answer marker that the prompt asks for.
        examples: worked examples, each a question, its solution, the marker and the answer. In plain text they are the
            whole instruction.
        chat: a conversation for a chat template; else plain text, the examples and the question apart by blank lines.

    Returns:
        Messages if `chat`, else a text that the completion continues on a new line.
    """
    instruction = task.instruction.replace(MARKER, marker)
    if chat:
        system = "\n\n".join([instruction, *examples])
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return "\n\n".join([*(examples or [instruction]), question]) + "\n"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, a plain text or a conversation, as the trainer makes them."""
    made: Any = (
        tokenizer(prompt)
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    )
    ids: list[int] = made["input_ids"]
    return ids


def fix_template(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], chat: bool) -> None:
    """Fix variables of the chat template (Qwen3's `enable_thinking`) in the template itself.

    It is saved with the adapter, so that whoever asks with that tokenizer asks what was asked in training.

    Raises:
        InputError: prompts are not conversations, or the template has no variable of this name.
    """
    require(not options or chat, "--chat_template_kwargs are of chat templates, and the prompts are plain text.")
    template: Any = tokenizer.chat_template
    for name, value in options.items():
        plain = isinstance(value, (str, int, bool, type(None))) or (isinstance(value, float) and math.isfinite(value))
        require(
            name.isidentifier() and plain,
            f"--chat_template_kwargs: expected a text, number or boolean, got {name}={value!r}.",
        )
        require(name in str(template), f"--chat_template_kwargs: this model's chat template has no variable {name}.")
        if isinstance(template, dict):  # several, by name
            template = {key: _with_variable(one, name, value) for key, one in template.items()}
        else:
            template = _with_variable(template, name, value)
    tokenizer.chat_template = template


def _with_variable(template: str, name: str, value: object) -> str:
    """A template in which a variable has this value, whatever it is rendered with or was fixed to before."""
    before = re.compile(rf"\A((?:{{%- set \w+ = .*? %}}\n)*?){{%- set {name} = .*? %}}\n")
    # The line break is trimmed when it is rendered, so that the template itself begins at a line's start, as it did.
    return f"{{%- set {name} = {value!r} %}}\n{before.sub(lambda match: match[1], template)}"


def run_records(folder: str) -> list[dict[str, Any]]:
    """What a run was asked for, by flag, with its prompt around `QUESTION` as `TEMPLATE`.

    Args:
        folder: of a run, also one that has not finished, of a checkpoint in it, or of a model merged from it, which
            keeps the prompt alone.

    Returns:
        the records that are found: `report.json`, which a finished run has, before `run.json`.
    """
    place, records = Path(folder), []
    for parent in (place, place.parent) if place.name.startswith("checkpoint-") else (place,):
        for file in (parent / "report.json", parent / RUN_FILE):
            try:
                record = json.loads(file.read_text()) if file.is_file() else {}
                if file.name == RUN_FILE:  # whose "prompt" is the flag
                    records.append(record | {TEMPLATE: record.get(TEMPLATE)})
                else:
                    records.append(record.get("arguments", {}) | {TEMPLATE: record.get("prompt")})
            except (ValueError, TypeError, AttributeError):  # damaged, or another program's
                continue
    return records


def recorded_prompt(folder: str) -> Any:
    """The prompt, around `QUESTION`, in the records of a run; None without one."""
    return next((record[TEMPLATE] for record in run_records(folder) if record[TEMPLATE]), None)


def prompt_as_trained(folder: str, question: str) -> Prompt | None:
    """A question in the prompt that a model was asked in training; None if no record of it is found.

    Args:
        folder: of a run, also one that has not finished, of a checkpoint in it, or of a model merged from it; or a hub
            id whose files are in the cache.
        question: a text.
    """
    template = recorded_prompt(folder)
    if isinstance(template, str):
        return template.replace(QUESTION, question)
    if not isinstance(template, list) or not all(
        isinstance(one, dict) and isinstance(one.get("content"), str) for one in template
    ):
        return None
    return [one | {"content": one["content"].replace(QUESTION, question)} for one in template]


def prompt_for(name: str, tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[Prompt, bool]:
    """What asks a model a question, and whether it is the prompt of its training (`prompt_as_trained`).

    Args:
        name: a run's folder, or any other model's name.
        tokenizer: whose chat template is used for a model that is not a run's, if there is one.
        question: a text.
    """
    if (trained := prompt_as_trained(name, question)) is not None:
        return trained, True
    return (question if tokenizer.chat_template is None else [{"role": "user", "content": question}]), False


def uses_chat(prompt: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are conversations, for `prompt` "chat", "plain" or "auto": where there is a chat template.

    Raises:
        InputError: a conversation is asked for and the tokenizer has no template.
    """
    require(
        prompt != "chat" or tokenizer.chat_template is not None,
        "--prompt chat needs a chat template, and this model's tokenizer has none.",
    )
    return prompt == "chat" or (prompt == "auto" and tokenizer.chat_template is not None)


def with_prompts(
    problems: list[Problem], ask: Callable[[str], Prompt], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[dict[str, Any]]:
    """The problems with their prompts; those whose prompt is too long are skipped with a message.

    Args:
        problems: of a task.
        ask: makes the prompt of a question.
        tokenizer: counts.
        longest: the most tokens that a prompt may have.

    Raises:
        InputError: every prompt is longer.
    """
    rows: list[dict[str, Any]] = [{**problem, "prompt": ask(problem["question"])} for problem in problems]
    shown = track(rows, "Counting tokens", disable=len(rows) < MANY)
    fitting = [row for row in shown if len(prompt_ids(tokenizer, row["prompt"])) <= longest]
    require(not rows or fitting, f"every prompt is longer than --max_prompt_length {longest} tokens.")
    if len(fitting) < len(rows):
        logger.warning(
            f"{len(rows) - len(fitting)} of {len(rows)} problems have prompts of more than {longest} tokens and "
            f"are skipped."
        )
    return fitting
