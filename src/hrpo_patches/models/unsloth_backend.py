"""unsloth as a backend: models and adapters through FastLanguageModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel

from hrpo_patches.models.backends import Backend
from hrpo_patches.thinking.backbone import causal_lm, runs_unsloth
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES, check_unsloth
from hrpo_thinking.parts import is_thinking_parameter


class UnslothBackend(Backend):
    """See `backends.Backend`."""

    fused_head = False  # it calls the backbone itself, past the causal mask that unsloth's causal-LM forward makes
    bptt = 0
    own_checkpointing = True
    own_adapters = True
    packs = False

    def runs(self, model: PreTrainedModel | PeftModel) -> bool:
        """Whether unsloth has put its forward into the class of `model`."""
        return runs_unsloth(type(causal_lm(model)))

    def refuse_stranger(self, model: str | PreTrainedModel | PeftModel) -> None:
        """Raise `InputError` for a model that runs unsloth's forward but was not loaded by unsloth, or would not be.

        Loading one model through unsloth changes the classes of transformers for the whole process.
        """
        if isinstance(model, str):
            stranger = any(runs_unsloth(getattr(transformers, family.causal_lm)) for family in FAMILIES.values())
        else:
            stranger = self.runs(model) and not hasattr(model, "max_seq_length")
        if stranger:
            raise InputError(
                "unsloth has changed the classes of transformers in this process, so a model that it did not load "
                "does not run; load it with FastLanguageModel.from_pretrained and pass that."
            )

    def load(self, source: str | Path, dtype: torch.dtype, max_seq_length: int, **options: Any) -> PreTrainedModel:
        """unsloth builds a model for the longest sequence.

        Raises:
            InputError: that is more than the model has positions for, or its family does not think in unsloth.
        """
        from unsloth import FastLanguageModel

        config = AutoConfig.from_pretrained(source)
        if options.get("thinking"):
            check_unsloth(config.model_type)
        positions = getattr(config, "max_position_embeddings", max_seq_length)
        if max_seq_length > positions:  # unsloth would scale its RoPE, and train another model
            raise InputError(
                f"prompt and completion may take {max_seq_length} tokens, and the model has {positions} positions; "
                f"lower --max_prompt_length or --max_completion_length."
            )
        model: PreTrainedModel
        model, _ = FastLanguageModel.from_pretrained(
            str(source), max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=False, **options
        )
        return model

    def add_adapter(
        self, model: PreTrainedModel, lora: dict[str, Any], modules_to_save: list[str], seed: int
    ) -> tuple[PeftModel, PeftConfig | None]:
        """The adapter is there, and the trainer has none to make."""
        from unsloth import FastLanguageModel

        adapted: PeftModel = FastLanguageModel.get_peft_model(
            model,
            **lora,
            modules_to_save=modules_to_save or None,
            use_gradient_checkpointing="unsloth",
            random_state=seed,
        )
        return adapted, None

    def finish_adapter(self, model: PeftModel, is_trainable: bool) -> PeftModel:
        """What unsloth gives to adapters of its own: fused LoRA kernels and their modes."""
        from unsloth import FastLanguageModel

        model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing="unsloth")
        for name, parameter in model.named_parameters():
            if "lora_" in name or (is_thinking_parameter(name) and ".modules_to_save." in name):
                parameter.requires_grad_(is_trainable)
        set_mode = FastLanguageModel.for_training if is_trainable else FastLanguageModel.for_inference
        finished: PeftModel = set_mode(model)
        return finished

    def set_training(self, model: PreTrainedModel | PeftModel, training: bool) -> None:
        """unsloth's training mode, with its gradient checkpointing."""
        from unsloth import FastLanguageModel

        if not training:
            model.eval()
            return
        kind = getattr(model, "_unsloth_gradient_checkpointing", "unsloth")
        FastLanguageModel.for_training(model, use_gradient_checkpointing=kind)


BACKEND = UnslothBackend()
