"""Lets a model answer prompts, batch by batch; knows models and text, nothing of tasks or files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase, set_seed

from hrpo_patches.models.backends import backend_of
from hrpo_patches.tasks.prompts import Prompt, prompt_ids
from hrpo_patches.thinking.controls import check_control, controlled


@dataclass
class Decoding:
    """How prompts are answered.

    Attributes:
        max_new_tokens: where a completion is cut.
        thinking: whether the model thinks.
        temperature: of the sampling, over the whole vocabulary; 0 is greedy.
        batch_size: prompts answered at once.
        seed: of the sampling; each batch has its own, so that a run can be resumed.
        thoughts: how many forced thoughts each completion begins with; they count for max_new_tokens.
        control: what takes the place of the thoughts; see `controls.CONTROLS`.
    """

    max_new_tokens: int
    thinking: bool
    temperature: float = 0.0
    batch_size: int = 50
    seed: int = 42
    thoughts: int = 0
    control: str = "live"


def batches_of(ids: list[list[int]], size: int) -> list[list[int]]:
    """The numbers of prompts that are answered together: those of similar length, shortest first."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    decoding: Decoding,
    first: int = 0,
    golds: list[str] | None = None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Answer prompts in batches of similar length.

    Args:
        model, tokenizer: the tokenizer has to pad on the left.
        ids: of the prompts.
        decoding: how.
        first: the number of batches that are passed over.
        golds: the gold answer of each prompt, for the controls that ask for it.

    Yields:
        The numbers of a batch's prompts, and the ids of each completion, without forced thoughts, up to its end token.

    Raises:
        InputError: before any work, if the control cannot be applied to each of the batches.
    """
    batches = batches_of(ids, decoding.batch_size)
    golds = golds if golds is not None else [""] * len(ids)
    if decoding.control != "live":
        check_control(decoding.control, [[golds[i] for i in batch] for batch in batches])
    extra: dict[str, Any] = {"tokenizer": tokenizer} if decoding.thinking or decoding.thoughts else {}
    if decoding.temperature:
        extra |= {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    else:
        extra |= {"do_sample": False}
    extra |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}  # as in rollouts, whatever the model's file says
    was_training = model.training
    model.eval()
    try:
        for number, batch in list(enumerate(batches))[first:]:
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(model.device)
            if decoding.temperature:
                set_seed(decoding.seed + number)
            replaced = decoding.control != "live"
            with controlled(model, decoding.control, [golds[i] for i in batch]) if replaced else nullcontext():
                out = model.generate(
                    **inputs,
                    max_new_tokens=decoding.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    thinking=decoding.thinking,
                    thoughts=decoding.thoughts,
                    **extra,
                )
            ends = model.generation_config.eos_token_id
            ends = set(ends if isinstance(ends, list) else [ends])
            rows = out[:, inputs["input_ids"].shape[1] + decoding.thoughts :].tolist()
            yield batch, [_up_to_end(row, ends) for row in rows]
    finally:
        backend_of(model).set_training(model, was_training)


def _up_to_end(row: list[int], ends: set[int | None]) -> list[int]:
    """A completion without what was padded behind its end token, which is kept."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    decoding: Decoding,
    title: str = "Answering",
) -> list[str]:
    """The model's completion of each prompt, without special tokens, in the prompts' order; `title` is the bar's."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    texts = [""] * len(ids)
    steps = -(-len(ids) // decoding.batch_size)
    for batch, rows in track(complete(model, tokenizer, ids, decoding), description=title, total=steps):
        for i, text in zip(batch, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts
