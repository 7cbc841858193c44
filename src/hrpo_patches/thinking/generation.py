"""What a causal language model of a patched family gains: generation that declines to think, and packed batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from transformers.generation import GenerationMixin

from hrpo_thinking.errors import InputError
from hrpo_thinking.request import FORCED_ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


def _with_stock_parameters(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, with the parameters of the `GenerationMixin` method of the same name added to its signature."""
    stock, own = signature(getattr(GenerationMixin, method.__name__)), signature(method).parameters
    positional = [one for one in stock.parameters.values() if one.kind is not one.VAR_KEYWORD]
    added = [one for one in own.values() if one.kind is one.KEYWORD_ONLY]
    rest = [one for one in stock.parameters.values() if one.kind is one.VAR_KEYWORD]
    method.__signature__ = stock.replace(parameters=[*positional, *added, *rest])  # type: ignore[attr-defined]
    return method


class ThinkingGenerationMixin(_Base):
    """What a patched causal language model gains; it stands before `GenerationMixin`, whose methods it extends."""

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained`: with thinking=False, the generation config has no thinking options."""
        parent: Any = super()
        parent.adjust_generation_fn(*args, **kwargs)
        if getattr(self.base_model, "declines_thinking", False):
            for name in ("thinking", "thoughts", "filler_token_id"):
                self.generation_config.__dict__.pop(name, None)

    @_with_stock_parameters
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
        wanted: Any = copy.deepcopy(asked)
        tokenizer: Any = getattr(self, "_batch_tokenizer", None)
        batching.check(self, tokenizer, wanted)
        manager = parent.init_continuous_batching(plain, config, *args, **kwargs)
        continuous.begin(manager, self, tokenizer, wanted)
        return manager

    @_with_stock_parameters
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
        # The engine takes the length as an argument of its own; forced thoughts must fit into it.
        options = {"thinking": thinking, "thoughts": thoughts, "max_new_tokens": kwargs.get("max_new_tokens")}
        if given := {name: value for name, value in options.items() if value is not None}:
            generation_config = copy.deepcopy(generation_config or self.generation_config)
            generation_config.update(**given)
        from hrpo_patches.thinking.continuous import thinking_batches

        with thinking_batches(self, tokenizer):
            return parent.generate_batch(inputs, generation_config, *args, **kwargs)
