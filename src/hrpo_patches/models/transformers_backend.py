"""transformers as a backend: the library as it is."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM


class TransformersBackend:
    """See `backends.Backend`."""

    fused_head = True
    several_passes = True
    own_checkpointing = False
    own_adapters = False

    def load(self, source: Any, dtype: torch.dtype, max_seq_length: int, **options: Any) -> Any:
        """The model takes sequences of any length."""
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)

    def add_adapter(
        self, model: Any, lora: dict[str, Any], modules_to_save: list[str], seed: int
    ) -> tuple[Any, PeftConfig | None]:
        """The trainer makes the adapter, and names the thinking modules itself."""
        return model, LoraConfig(**lora, task_type="CAUSAL_LM")

    def finish_adapter(self, model: Any, is_trainable: bool) -> Any:
        """Nothing is left to do."""
        return model if is_trainable else model.eval()

    def set_training(self, model: Any, training: bool) -> None:
        """torch's own mode."""
        model.train(training)


BACKEND = TransformersBackend()
