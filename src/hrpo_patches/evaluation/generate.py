"""Lets a model answer prompts, batch by batch; knows models and text, nothing of tasks or files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from transformers import ContinuousBatchingConfig, PreTrainedTokenizerBase, set_seed

from hrpo_patches.models.backends import backend_of
from hrpo_patches.tasks.prompts import Prompt, prompt_ids
from hrpo_patches.thinking.continuous import cache_size
from hrpo_patches.thinking.controls import SEVERAL, check_control, controlled
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import RESIDUALS


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
        engine: "generate", or "continuous" for transformers' continuous batching.
    """

    max_new_tokens: int
    thinking: bool
    temperature: float = 0.0
    batch_size: int = 50
    seed: int = 42
    thoughts: int = 0
    control: str = "live"
    engine: str = "generate"


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
    was_training = model.training
    model.eval()
    try:
        for number, batch in list(enumerate(batches))[first:]:
            if decoding.temperature:
                set_seed(decoding.seed + number)
            replaced = decoding.control != "live"
            with controlled(model, decoding.control, [golds[i] for i in batch]) if replaced else nullcontext():
                yield batch, _answered(model, tokenizer, [ids[i] for i in batch], decoding)
    finally:
        backend_of(model).set_training(model, was_training)


def _answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], decoding: Decoding
) -> list[list[int]]:
    """The completions of one batch."""
    options: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        options = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    # As in rollouts, whatever the model's file says.
    options |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": decoding.max_new_tokens}
    options |= {"pad_token_id": tokenizer.pad_token_id, "thinking": decoding.thinking, "thoughts": decoding.thoughts}
    if decoding.engine == "continuous":
        config = copy.deepcopy(model.generation_config)
        config.update(**options)
        size = cache_size(model, max(map(len, ids)) + decoding.max_new_tokens, len(ids))
        given = {"tokenizer": tokenizer, "continuous_batching_config": ContinuousBatchingConfig(**size)}
        outputs = model.generate_batch(ids, config, **given).values()
        if failed := [output.error for output in outputs if output.error]:
            raise RuntimeError(f"continuous batching failed: {failed[0]}")
        return [output.generated_tokens[decoding.thoughts :] for output in outputs]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
    marker = {"tokenizer": tokenizer} if decoding.thinking or decoding.thoughts else {}
    out = model.generate(**inputs, **options, **marker)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    rows = out[:, inputs["input_ids"].shape[1] + decoding.thoughts :].tolist()
    return [_up_to_end(row, ends) for row in rows]


ENGINES = ("generate", "continuous", "auto")
ENGINE_HELP = (
    "What makes the completions: generate; continuous, transformers' continuous batching; or auto, the one that was "
    "measured to be faster here."
)


def choose_engine(
    asked: str, model: Any, residual: str | None, thoughts: int = 0, control: str = "live"
) -> tuple[str, str]:
    """("generate" or "continuous", why), for what is asked of `model`.

    Raises:
        InputError: continuous batching was asked for, and cannot do it.
    """
    obstacle = None
    if not backend_of(model).packs:
        obstacle = "unsloth's models do not run in continuous batching"
    elif residual is None and thoughts:
        obstacle = "forced thoughts without thinking need generate"
    elif residual is not None and not RESIDUALS[residual].needs_state:
        obstacle = f"continuous batching hands over no distribution, which the {residual} residual is made from"
    elif control in SEVERAL:
        obstacle = f"the control {control!r} needs the rows of a padded batch"
    if asked == "continuous" and obstacle is not None:
        raise InputError(f"--engine continuous cannot be used: {obstacle}.")
    if asked != "auto":
        return asked, "asked for"
    if obstacle is None and model.device.type != "cpu":
        obstacle = "which of the two is faster on this device was not measured"
    return (
        ("continuous", "nothing else to install, and faster on a CPU") if obstacle is None else ("generate", obstacle)
    )


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
