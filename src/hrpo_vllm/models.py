"""vLLM's families, each with the thinking modules on its backbone; the maths is the library's, the rest vLLM's."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrpo_thinking.blend import Blend
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import thinking_table
from hrpo_thinking.modules import thinking_modules
from hrpo_thinking.parts import MODULES, is_thinking_parameter
from hrpo_vllm.engine import tokenizer_of
from hrpo_vllm.names import architecture
from hrpo_vllm.requests import EngineThoughts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import VllmConfig


class _Reader(Blend):
    """The library's blend over the modules of a backbone that is vLLM's."""

    training = False

    def __init__(self, backbone: nn.Module, config: PreTrainedConfig) -> None:
        self.config = config
        for name in MODULES:
            setattr(self, name, getattr(backbone, name))
        # vLLM pads its table; the mean norm is that of the embeddings alone.
        table = backbone.embed_tokens
        self.get_input_embeddings = lambda: SimpleNamespace(weight=table.weight[: config.vocab_size])  # type: ignore


class ThinkingModel:
    """What a family's causal language model gains; it stands before vLLM's class.

    Attributes:
        thoughts: of all requests.
        missing: the thinking parameters that no weights have arrived for.
        warming_up: whether the engine's requests are its own, made up before it serves any.
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        config, scheduler = vllm_config.model_config.hf_config, vllm_config.scheduler_config
        thinking = ThinkingConfig.of(config)
        assert thinking is not None  # engine.check_engine
        for name, module in thinking_modules(config, thinking).items():
            self.model.add_module(name, module.requires_grad_(False))
        self._blend = _Reader(self.model, config)
        tokenizer = tokenizer_of(vllm_config.model_config)
        with torch.device("cpu"):  # an engine makes its models within that of its own, token by token
            table = thinking_table(tokenizer, thinking, config.vocab_size)
        self.thoughts = EngineThoughts(
            config.hidden_size,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            table,
            thinking.thoughts,
            tokenizer.get_vocab().get(thinking.filler),
            vllm_config.model_config.dtype,
        )
        named: Any = self.named_parameters()  # type: ignore[attr-defined]  # a module's
        self.missing = {name for name, _ in named if is_thinking_parameter(name)}
        self._loaded = self.warming_up = False

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        rows, thoughts = positions.shape[-1], self.thoughts
        embeds = self.model.embed_input_ids(input_ids)[None]
        thinking = ThinkingInputs(thoughts.states[None, :rows], thoughts.mask[None, :rows])
        blended = self._blend.blend_thinking(embeds, thinking)
        inputs = thoughts.inputs[:rows].copy_(blended[0])  # where graphs of the backbone read them
        return super().forward(input_ids, positions, intermediate_tensors, inputs)  # type: ignore[misc]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        self.thoughts.observe(hidden_states, logits)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's. The first weights are a folder's: thinking weights that it does not claim to hold may follow.

        Raises:
            InputError: the folder claims to hold thinking weights, and lacks some.
        """
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        self.missing -= loaded
        if self._loaded:
            return loaded
        self._loaded = True
        if self.missing and self._blend.config.thinking["in_checkpoint"]:
            raise InputError(f"the checkpoint is to hold thinking weights, but {min(self.missing)} is missing.")
        self._blend.residual_norm()  # measured here, where a step may still wait for it
        return loaded | self.missing

    def check_arrived(self) -> None:
        """Raise `InputError` while thinking weights are missing."""
        if self.missing:
            raise InputError(f"the model cannot think yet: no weights have arrived for {min(self.missing)}.")

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """What vLLM's second model runner asks a model for."""
        from hrpo_vllm.workers import model_state_class

        return model_state_class()


def __getattr__(name: str) -> Any:
    """A family's class ("ThinkingLlamaForCausalLM"), made when vLLM asks: no other family's module is imported."""
    for family in FAMILIES.values():
        if family.vllm is not None and name == architecture(family.causal_lm):
            module, stock = family.vllm
            base = getattr(import_module(f"vllm.model_executor.models.{module}"), stock)
            model_class = globals()[name] = type(name, (ThinkingModel, base), {"__module__": __name__})
            return model_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
