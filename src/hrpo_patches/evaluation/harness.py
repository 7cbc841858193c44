"""`hrpo`, a model for lm-evaluation-harness: its own `hf`, which thinks."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from hrpo_patches.models.adapter import load_adapter
from hrpo_patches.models.hub import adapter_folder
from hrpo_patches.models.record import THINKING_FILE
from hrpo_patches.models.smollm2 import found
from hrpo_patches.thinking.backbone import is_untrained, temporarily
from hrpo_thinking.errors import InputError


@register_model("hrpo")
class ThinkingLM(HFLM):
    """The harness's `hf` model, whose generation tasks are answered thinking.

    Args:
        pretrained: as `hf` takes it.
        peft: the folder of a trained adapter; `load_adapter` loads it, with the marker that it was trained with.
        thinking: False answers as `hf` does.
        kwargs: whatever else `hf` takes.

    Raises:
        InputError: the model was never trained to think, or the task has no completions to think in.
    """

    def __init__(
        self, pretrained: str | PreTrainedModel, peft: str | None = None, thinking: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(pretrained=found(pretrained) if isinstance(pretrained, str) else pretrained, **kwargs)
        if peft is not None and (adapter_folder(peft) / THINKING_FILE).is_file():
            self._model = load_adapter(self.model, peft)
        elif peft is not None:
            raise InputError(
                f"{peft} has no {THINKING_FILE}: it is not a thinking adapter. Evaluate others with --model hf."
            )
        if thinking and is_untrained(self.model):
            raise InputError("this model was never trained to think, so it would think at random; add thinking=False.")
        self.thinking = thinking

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        extra: dict[str, Any] = {"thinking": self.thinking}
        forced = self.model.generation_config.thoughts or 0
        if self.thinking or forced:
            extra["tokenizer"] = self.tokenizer
        out = super()._model_generate(context, max_length + forced, stop, **kwargs, **extra)
        width = context.shape[1]
        return torch.cat([out[:, :width], out[:, width + forced :]], dim=1)  # a filler is not text

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        if self.thinking:
            raise InputError("this task scores given answers, in which nothing is thought; add thinking=False.")
        return super()._loglikelihood_tokens(*args, **kwargs)


def main(argv: list[str]) -> int:
    """The harness's own command line, with `hrpo` among its models."""
    with temporarily(sys, argv=["lm_eval", *argv]):
        cli_evaluate()
    return 0
