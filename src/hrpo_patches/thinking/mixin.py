"""What a patched family gains: modules made, loaded and saved, inputs that think; leaves the maths to `Blend`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hrpo_patches.thinking import adjoint
from hrpo_thinking.blend import Blend
from hrpo_thinking.config import ThinkingConfig, record_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import LOOSE_KEYWORDS, ThinkingInputs
from hrpo_thinking.modules import ThinkingModule, make_projection, thinking_modules
from hrpo_thinking.parts import MODULE_PATTERN, MODULES, is_thinking_parameter
from hrpo_thinking.request import FORCED_ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


def check_modules_to_save(model: nn.Module, wanted: Sequence[str] | None) -> None:
    """Called by PEFT before it makes an adapter's trained copies: it passes modules that a model lacks by.

    Raises:
        InputError: `wanted` names a thinking module, and the model has none.
    """
    paths = [f".{path}" for path, _ in model.named_modules()]
    for entry in wanted or ():
        if is_thinking_parameter(f"{entry}.") and not any(path.endswith(f".{entry}") for path in paths):
            raise InputError(
                f"the adapter holds {entry}, and this model has no such module, so PEFT would lose it; load the "
                f"adapter with hrpo_patches.load_adapter(model, folder)."
            )


class ThinkingMixin(Blend, _Base):
    """What a patched model family gains: the thinking modules, their life, and the inputs of a forward that thinks."""

    declines_thinking = False  # whether thinking=False was said, which leaves a checkpoint's thinking weights out

    def add_thinking_modules(self, config: Any) -> None:
        """Called by a patched backbone's `__init__` before `post_init`; adds nothing unless `config.thinking` asks.

        A plain model's config is left as stock's, without a word about thinking.

        Raises:
            InputError: `config.thinking` holds a value that cannot work.
        """
        thinking = ThinkingConfig.of(config)
        if thinking is None:
            if vars(config).pop("thinking", None) is False:
                self.declines_thinking = True
            return
        config.thinking = record_of(thinking, config.thinking)
        for name, module in thinking_modules(config, thinking).items():
            self.add_module(name, module)
        # The first also keeps quantizers away, the second holds under bf16 as well as fp16.
        self._keep_in_fp32_modules = set(MODULES)
        self._keep_in_fp32_modules_strict = set(MODULES)
        if not config.thinking["in_checkpoint"]:
            self._keys_to_ignore_on_load_missing = {MODULE_PATTERN.pattern}

    def begin_thinking(self, thinking: ThinkingConfig, held: dict[str, Any] | None = None) -> None:
        """Let this backbone think as described: with fresh modules, or a fresh projection of another kind.

        Args:
            thinking: how.
            held: the record (`record_of`) of the weights that are to be loaded or trained further; by default its own.
        """
        self.config.thinking = record_of(thinking, held if held is not None else self.config.thinking)
        if not hasattr(self, "thinking_projection"):
            self.add_thinking_modules(self.config)
            for name in MODULES:
                getattr(self, name).to(self.get_input_embeddings().weight.device).train(self.training)
            return
        fresh = make_projection(self.config.hidden_size, thinking)
        own = getattr(self.thinking_projection, "original_module", self.thinking_projection)  # of PEFT's wrapper
        current = {name: p.shape for name, p in own.named_parameters()}
        if current != {name: p.shape for name, p in fresh.named_parameters()}:
            self.thinking_projection = fresh.to(self.thinking_residual_Lambda.Lambda.device)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ThinkingModule):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        missing = sorted(key for key in loading_info.missing_keys if is_thinking_parameter(key))
        whole = [key for key, _ in self.named_parameters() if is_thinking_parameter(key)]
        thinking = ThinkingConfig.of(self.config)
        claimed = thinking is not None and record_of(thinking, self.config.thinking)["in_checkpoint"]
        stray = sorted(key for key in loading_info.unexpected_keys if is_thinking_parameter(key))
        declined = getattr(getattr(self, self.base_model_prefix, self), "declines_thinking", False)
        if stray and thinking is None and not declined:
            raise InputError(
                f"this checkpoint holds thinking weights ({stray[0]}), and its config does not say that it thinks; "
                f"load it with thinking={{}} to use them, or with thinking=False to leave them out."
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if missing and (claimed or len(missing) < len(whole)):
            raise InputError(
                f"the checkpoint is to hold thinking weights, but {', '.join(missing)} is missing: it is damaged or "
                f"was saved without. To start all of them anew, load it once with thinking=False and save that."
            )

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained`: a model that declined to think leaves its file's wish to think, too."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]  # GenerationMixin's
        if getattr(getattr(self, self.base_model_prefix, self), "declines_thinking", False):
            for name in ("thinking", "thoughts", "filler_token_id"):
                self.generation_config.__dict__.pop(name, None)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        thinking = getattr(self.config, "thinking", None)
        if not isinstance(thinking, dict):
            return super().save_pretrained(*args, **kwargs)
        self.config.thinking = thinking | {"in_checkpoint": True}  # of the file that is written, not of this model
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.thinking = thinking

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As stock's; the manager's requests think where `generation_config` asks for it (`generate_batch`)."""
        parent: Any = super()
        asked = generation_config if generation_config is not None else getattr(self, "generation_config", None)
        if not getattr(asked, "thinking", None):
            if getattr(asked, "thoughts", None):
                raise InputError(FORCED_ALONE)
            return parent.init_continuous_batching(generation_config, continuous_batching_config, *args, **kwargs)
        from hrpo_patches.thinking import batching, continuous

        if getattr(asked, "cache_implementation", None) == "paged":
            raise InputError("generate(cache_implementation='paged') hands no thoughts over; call generate_batch.")
        plain: Any = copy.deepcopy(asked)
        plain.thinking = plain.thoughts = None
        config = batching.batching_config(continuous_batching_config, self, kwargs.get("workload_hints"))
        if getattr(self, "_cached_continuous_batching_manager", None) is not None:
            raise InputError("a manager that was kept cannot think; destroy_cached_continuous_batching_manager first.")
        wanted, tokenizer = copy.deepcopy(asked), getattr(self, "_batch_tokenizer", None)
        batching.check(self, tokenizer, wanted)
        manager = parent.init_continuous_batching(plain, config, *args, **kwargs)
        continuous.begin(manager, self, tokenizer, wanted)
        return manager

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        *args: Any,
        thinking: bool | None = None,
        thoughts: int | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As stock's; with `thinking=True` and a `tokenizer`, each output has thinking_states and the like.

        Raises:
            InputError: as `generate`, or this engine cannot think as the model does.
        """
        parent: Any = super()
        # The engine is told the length by a word of its own, but forced thoughts have to fit into it.
        said = {"thinking": thinking, "thoughts": thoughts, "max_new_tokens": kwargs.get("max_new_tokens")}
        if given := {name: value for name, value in said.items() if value is not None}:
            generation_config = copy.deepcopy(generation_config or self.generation_config)
            generation_config.update(**given)
        from hrpo_patches.thinking.continuous import thinking_batches

        with thinking_batches(self, tokenizer):
            return parent.generate_batch(inputs, generation_config, *args, **kwargs)

    def think(
        self,
        embeds: Tensor,
        thinking: ThinkingInputs | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, ThinkingInputs]:
        """Called by a patched forward before its layers: their inputs (B, L, d), and what `credit` takes.

        Raises:
            InputError: as `blend_thinking`, or the gradient cannot be taken as `thinking.bptt` asks.
        """
        if thinking is None:
            raise InputError(LOOSE_KEYWORDS)
        if thinking.bptt is not None or thinking.states is None:
            thinking = adjoint.ready(self, embeds, thinking, attention_mask, position_ids)
        return self.blend_thinking(embeds, thinking), thinking

    def credit(self, hidden: Tensor, thinking: ThinkingInputs) -> Tensor:
        """Called by a patched forward after its last norm: the hidden states (B, L, d), through which a gradient flows
        back to the thoughts."""
        return hidden if thinking.bptt is None else adjoint.credited(self, hidden, thinking)
