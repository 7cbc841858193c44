"""Answers prompts in batches of similar length, with any engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase, set_seed

from hrpo_patches.engines.base import Engine, sampling_of
from hrpo_patches.engines.choice import ENGINES
from hrpo_patches.models.backends import backend_of
from hrpo_patches.tasks.prompts import Prompt, prompt_ids
from hrpo_patches.thinking.controls import check_control, controlled
from hrpo_thinking.errors import InputError, require

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model


@dataclass
class Decoding:
    """How prompts are answered.

    Attributes:
        max_new_tokens: the most tokens of a completion, forced thoughts included.
        thinking: whether the model thinks.
        temperature: of the sampling, over the whole vocabulary; 0 is greedy.
        batch_size: prompts answered at once.
        seed: of the sampling; each batch has its own, so that a run can be resumed.
        thoughts: forced thoughts at the start of each completion.
        control: what takes the place of the thoughts; see `controls.CONTROLS`.
        engine: a name of `ENGINES`.

    Raises:
        InputError: the engine has another name.
    """

    max_new_tokens: int
    thinking: bool
    temperature: float = 0.0
    batch_size: int = 50
    seed: int = 42
    thoughts: int = 0
    control: str = "live"
    engine: str = "generate"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(
                f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}; choose_engine picks one."
            )


def batches_of(ids: list[list[int]], size: int) -> list[list[int]]:
    """The numbers of prompts that are answered together: those of similar length, shortest first."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # stable: a resumed run has the same batches
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def complete(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    decoding: Decoding,
    first: int = 0,
    golds: list[str] | None = None,
    engine: Engine | None = None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Answer prompts in batches of similar length.

    Args:
        model, tokenizer: the tokenizer must pad on the left.
        ids: of the prompts.
        decoding: how.
        first: the number of batches that are skipped.
        golds: the gold answer of each prompt, for the controls that ask for it.
        engine: one that is started and has the model's weights (`refresh_weights`), used in the place of
            `decoding.engine`; by default that one is started, and ended.

    Yields:
        The numbers of a batch's prompts, and the ids of each completion, without forced thoughts, up to its end token.

    Raises:
        InputError: before any work, if the control cannot be applied to each of the batches; afterwards, if `engine`
            did not apply it, or returned another number of completions than of prompts.
    """
    batches = batches_of(ids, decoding.batch_size)
    golds = golds if golds is not None else [""] * len(ids)
    live = decoding.control == "live"  # then any engine will do, vLLM's among them
    if not live:
        check_control(decoding.control, [[golds[i] for i in batch] for batch in batches])
    if first >= len(batches):
        return
    with ExitStack() as stack:
        # Last in, first out: the engine ends before the model is trained on.
        stack.callback(backend_of(model).set_training, model, model.training)
        model.eval()
        if engine is None:
            longest = max(map(len, ids)) + decoding.max_new_tokens
            start = ENGINES[decoding.engine].start
            engine = stack.enter_context(start(model, tokenizer, longest, decoding.batch_size))
        how = (decoding.max_new_tokens, decoding.thinking, decoding.temperature, decoding.thoughts)
        sampling = sampling_of(model, tokenizer, *how)
        for number, batch in list(enumerate(batches))[first:]:
            if decoding.temperature:
                set_seed(decoding.seed + number)  # of this batch alone, so that a resumed evaluation samples the same
            own = [golds[i] for i in batch]
            with nullcontext([True]) if live else controlled(model, decoding.control, own) as applied:
                completed = engine.complete([ids[i] for i in batch], sampling)
            name, count = type(engine).__name__, len(completed.tokens)
            text = f"{name} did not apply the control {decoding.control!r}: it does not run the model's forward."
            require(bool(applied) or not decoding.thinking, text)
            require(count == len(batch), f"{name} returned {count} completions for {len(batch)} prompts.")
            yield batch, completed.tokens  # without the control: whoever iterates may use the model


def completions(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    decoding: Decoding,
    title: str | None = "Answering",
    engine: Engine | None = None,
) -> list[str]:
    """The model's completion of each prompt, without special tokens, in the prompts' order.

    `prompts` are texts or conversations, and `title` is the bar's, None for no bar; the rest as for `complete`.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    texts = [""] * len(ids)
    steps = -(-len(ids) // decoding.batch_size)
    done = complete(model, tokenizer, ids, decoding, engine=engine)
    for batch, rows in track(done, description=title or "", total=steps, disable=title is None):
        for i, text in zip(batch, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts
