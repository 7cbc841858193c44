"""Lets a model answer prompts, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase, set_seed

from hrpo_patches.models.backends import backend_of
from hrpo_patches.tasks.prompts import Prompt, prompt_ids
from hrpo_patches.thinking.backbone import causal_lm, temporarily
from hrpo_patches.thinking.batching import cache_size
from hrpo_patches.thinking.controls import SEVERAL, check_control, controlled
from hrpo_patches.thinking.decoding import ends_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.request import FORCED_ALONE, check_residual
from hrpo_vllm import check_version


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
        engine: "generate", "continuous" for transformers' continuous batching, or "vllm".
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
    vllm: Any = None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Answer prompts in batches of similar length.

    Args:
        model, tokenizer: the tokenizer must pad on the left.
        ids: of the prompts.
        decoding: how.
        first: the number of batches that are skipped.
        golds: the gold answer of each prompt, for the controls that ask for it.
        vllm: a `ThinkingVLLM` with the model's weights, for that engine; by default one is made, and ended.

    Yields:
        The numbers of a batch's prompts, and the ids of each completion, without forced thoughts, up to its end token.

    Raises:
        InputError: before any work, if the control cannot be applied to each of the batches.
    """
    batches = batches_of(ids, decoding.batch_size)
    golds = golds if golds is not None else [""] * len(ids)
    if decoding.control != "live":
        check_control(decoding.control, [[golds[i] for i in batch] for batch in batches])
    with ExitStack() as stack:
        stack.callback(backend_of(model).set_training, model, model.training)
        model.eval()
        if decoding.engine == "vllm" and vllm is None and first < len(batches):
            from hrpo_patches.models.vllm_engine import engine_of

            longest = max(map(len, ids)) + decoding.max_new_tokens
            vllm = stack.enter_context(engine_of(model, tokenizer, longest, decoding.batch_size))
        for number, batch in list(enumerate(batches))[first:]:
            if decoding.temperature:
                set_seed(decoding.seed + number)
            replaced = decoding.control != "live"
            with controlled(model, decoding.control, [golds[i] for i in batch]) if replaced else nullcontext():
                yield batch, _answered(model, tokenizer, [ids[i] for i in batch], decoding, vllm)


def _answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], decoding: Decoding, vllm: Any
) -> list[list[int]]:
    """The completions of one batch."""
    if decoding.engine == "vllm":
        asked = (decoding.max_new_tokens, decoding.temperature, decoding.thinking, decoding.thoughts)
        rows = vllm.answers(ids, *asked, seeds=torch.randint(2**31, (len(ids),)).tolist())
        return [row[decoding.thoughts :] for row in rows]
    config = _config(model, tokenizer, decoding)
    if decoding.engine == "continuous":
        size = cache_size(model, max(map(len, ids)) + decoding.max_new_tokens, len(ids))
        given = {"tokenizer": tokenizer, "continuous_batching_config": ContinuousBatchingConfig(**size)}
        outputs = model.generate_batch(ids, config, **given).values()
        if failed := [output.error for output in outputs if output.error]:
            raise RuntimeError(f"continuous batching failed: {failed[0]}")
        return [output.generated_tokens[decoding.thoughts :] for output in outputs]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
    marker = {"tokenizer": tokenizer} if decoding.thinking or decoding.thoughts else {}
    with temporarily(causal_lm(model), generation_config=config):  # not an argument, which the model's own completes
        out = model.generate(**inputs, **marker)
    ends = set(ends_of(model, tokenizer))
    rows = out[:, inputs["input_ids"].shape[1] + decoding.thoughts :].tolist()
    return [_up_to_end(row, ends) for row in rows]


def _config(model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> GenerationConfig:
    """How every engine decodes: as in rollouts, whatever the model's own file says of sampling.

    Thus the engines agree, of which none knows all that such a file can ask for.
    """
    own = causal_lm(model).generation_config
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=ends_of(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        filler_token_id=own.filler_token_id,
        max_new_tokens=decoding.max_new_tokens,
        thinking=decoding.thinking,
        thoughts=decoding.thoughts,
        **sampling,
    )


# From what everything can be done in to what is fastest on a CPU, where it was measured (docs/performance.md).
ENGINES = ("generate", "continuous", "vllm")
CHOICES = (*ENGINES, "auto")
ENGINE_HELP = (
    "What makes the completions: generate; continuous, transformers' continuous batching; vllm; or auto, the fastest "
    "that is installed and was measured here."
)
_TITLES = {"continuous": "continuous batching", "vllm": "vLLM"}


def choose_engine(
    asked: str,
    model: Any,
    residual: str | None,
    thoughts: int = 0,
    control: str = "live",
    longest: int = 0,
    device: torch.device | None = None,
) -> tuple[str, str]:
    """(one of `ENGINES`, why), for what is asked of `model`.

    Args:
        asked: one of `CHOICES`.
        model: that answers.
        residual: that it thinks with; None if it does not think.
        thoughts, control: as of `Decoding`.
        longest: tokens of a prompt and its completion.
        device: that the model will be on; by default the one that it is on.

    Raises:
        InputError: another engine than generate was asked for, and cannot do it.
    """
    device = device if device is not None else model.device
    if asked != "auto":
        try:
            _check_engine(asked, model, residual, thoughts, control, longest, device)
        except InputError as error:
            raise InputError(f"--engine {asked} cannot be used: {error}") from None
        return asked, "asked for"
    if device.type != "cpu":
        return "generate", "which engine is fastest on this device was not measured"
    reasons = []
    for engine in reversed(ENGINES[1:]):
        try:
            _check_engine(engine, model, residual, thoughts, control, longest, device)
        except InputError as error:
            reasons.append(f"not {engine}: {str(error).rstrip('.')}")
        else:
            return engine, "; ".join(reasons) or "the fastest on a CPU"
    return "generate", "; ".join(reasons)


def _check_engine(
    engine: str, model: Any, residual: str | None, thoughts: int, control: str, longest: int, device: torch.device
) -> None:
    """Raise `InputError` if an engine cannot do what is asked of `model`."""
    if engine == "generate":
        return
    title = _TITLES[engine]
    if engine == "vllm":
        check_version()
    if not backend_of(model).packs:
        raise InputError(f"unsloth's models do not run in {title}.")
    if residual is None and thoughts:
        raise InputError(FORCED_ALONE)
    if residual is not None:
        check_residual(residual, title)
    if control in SEVERAL:
        raise InputError(f"the control {control!r} needs the rows of a padded batch.")
    if engine == "vllm" and control != "live":
        raise InputError("controls stand between a thought and its blend, which vLLM makes by itself.")
    if engine == "vllm":
        _check_vllm(model, longest, device)


def _check_vllm(model: Any, longest: int, device: torch.device) -> None:
    """Raise `InputError` where vLLM would not start."""
    if device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("vLLM beside several processes needs GPUs.")
    own = causal_lm(model).config.get_text_config()
    rope = getattr(own, "rope_parameters", None) or {}
    stretched = rope.get("rope_type", "default") not in ("default", "llama3")  # vLLM then allows for more
    if longest > own.max_position_embeddings and not stretched:
        raise InputError(
            f"a prompt and its completion take {longest} tokens, and vLLM holds on to the model's "
            f"{own.max_position_embeddings} positions; ask for fewer tokens."
        )


def _up_to_end(row: list[int], ends: set[int]) -> list[int]:
    """A completion without what was padded behind its end token, which is kept."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    decoding: Decoding,
    title: str | None = "Answering",
    vllm: Any = None,
) -> list[str]:
    """The model's completion of each prompt, without special tokens, in the prompts' order.

    `title` is the bar's, None for no bar; the rest as for `complete`.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    texts = [""] * len(ids)
    steps = -(-len(ids) // decoding.batch_size)
    done = complete(model, tokenizer, ids, decoding, vllm=vllm)
    for batch, rows in track(done, description=title or "", total=steps, disable=title is None):
        for i, text in zip(batch, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts
