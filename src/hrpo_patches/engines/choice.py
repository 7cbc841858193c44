"""The engines by name, what each cannot do, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from hrpo_patches.engines.base import Engine
from hrpo_patches.engines.continuous import ContinuousEngine
from hrpo_patches.engines.generate import GenerateEngine
from hrpo_patches.models.backends import backend_of
from hrpo_patches.thinking.backbone import causal_lm
from hrpo_patches.thinking.controls import SEVERAL
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import check_vllm
from hrpo_thinking.request import FORCED_ALONE, check_residual
from hrpo_vllm.names import check_version

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model


@dataclass(frozen=True)
class Needs:
    """What an engine is needed for.

    Attributes:
        residual: that the completions think with; None if they do not think.
        thoughts: forced thoughts of a completion.
        control: what takes the place of the thoughts; see `controls.CONTROLS`.
        longest: tokens of a prompt and its completion.
        device: that the model will be on; by default the one that it is on.
    """

    residual: str | None
    thoughts: int = 0
    control: str = "live"
    longest: int = 0
    device: torch.device | None = None


@dataclass(frozen=True)
class EngineKind:
    """An engine that `Decoding` and `choose_engine` know by name. The flags of commands list those of this package.

    Attributes:
        check: raises `InputError` for needs of a model that the engine cannot meet, or where it cannot run.
        start: a context in which the engine runs, of (model, tokenizer, longest, rows): tokens of a prompt and its
            completion, and the number of completions at once.
    """

    check: Callable[[Any, Needs], None]
    start: Callable[[Any, PreTrainedTokenizerBase, int, int], AbstractContextManager[Engine]]


def _check_packed(model: Model, needs: Needs, title: str) -> None:
    """Raise `InputError` for what no engine can do that packs requests instead of padding them."""
    if not backend_of(model).packs:
        raise InputError(f"unsloth's models do not run in {title}.")
    if needs.residual is None and needs.thoughts:
        raise InputError(FORCED_ALONE)
    if needs.residual is not None:
        check_residual(needs.residual, title)
    if needs.control in SEVERAL:
        raise InputError(f"the control {needs.control!r} needs the rows of a padded batch.")


def _check_vllm(model: Model, needs: Needs) -> None:
    """Raise `InputError` where vLLM would not start, or could not do what is needed."""
    check_version()  # first: without vLLM no other answer is of use
    _check_packed(model, needs, "vLLM")
    if needs.residual is not None:
        check_vllm(causal_lm(model).config.model_type)
    if needs.control != "live":
        raise InputError("controls change the blend of a thought, which vLLM computes by itself; use generate.")
    device = needs.device if needs.device is not None else model.device  # where it will be, not where it is now
    if device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("vLLM beside several processes needs GPUs.")
    own = causal_lm(model).config.get_text_config()
    rope = getattr(own, "rope_parameters", None) or {}
    stretched = rope.get("rope_type", "default") not in ("default", "llama3")  # vLLM then allows for more
    if needs.longest > own.max_position_embeddings and not stretched:
        raise InputError(
            f"a prompt and its completion take {needs.longest} tokens, and vLLM holds on to the model's "
            f"{own.max_position_embeddings} positions; ask for fewer tokens."
        )


@contextmanager
def _start_vllm(model: Model, tokenizer: PreTrainedTokenizerBase, longest: int, rows: int) -> Iterator[Engine]:
    from hrpo_patches.engines.vllm import running_engine  # imports vLLM, which not every process wants

    with running_engine(model, tokenizer, longest, rows) as engine:
        yield engine


# From the engine that can do everything to the fastest one on a CPU, where this was measured (docs/performance.md).
ENGINES: dict[str, EngineKind] = {
    "generate": EngineKind(
        lambda model, needs: None,
        lambda model, tokenizer, longest, rows: nullcontext(GenerateEngine(model, tokenizer)),
    ),
    "continuous": EngineKind(
        lambda model, needs: _check_packed(model, needs, "continuous batching"),
        lambda model, tokenizer, longest, rows: nullcontext(ContinuousEngine(model, tokenizer)),
    ),
    "vllm": EngineKind(_check_vllm, _start_vllm),
}
CHOICES = (*ENGINES, "auto")
ENGINE_HELP = (
    "What makes the completions: generate; continuous, transformers' continuous batching; vllm; or auto, the fastest "
    "that is installed and was measured here."
)


def choose_engine(asked: str, model: Model, needs: Needs) -> tuple[str, str]:
    """(the name of an engine, why it is chosen).

    Args:
        asked: a name of `ENGINES`, or auto.
        model: the model to complete with.
        needs: what the engine must be able to do.

    Raises:
        InputError: `asked` names no engine, or one that cannot do what is needed.
    """
    if asked not in (*ENGINES, "auto"):
        raise InputError(f"--engine must be one of {', '.join((*ENGINES, 'auto'))}, not {asked!r}.")
    if asked != "auto":
        try:
            ENGINES[asked].check(model, needs)
        except InputError as error:
            raise InputError(f"--engine {asked} cannot be used: {error}") from None
        return asked, "asked for"
    # auto
    if (needs.device if needs.device is not None else model.device).type != "cpu":
        return "generate", "which engine is fastest on this device was not measured"
    reasons: list[str] = []
    for name in reversed(ENGINES):  # the fastest first
        try:
            ENGINES[name].check(model, needs)
        except InputError as error:  # said to the user, who may have expected the faster one
            reasons.append(f"not {name}: {str(error).rstrip('.')}")
        else:
            return name, "; ".join(reasons) or "the fastest on a CPU"
    raise AssertionError("generate can do everything")
