"""What a patched family gains: modules made, loaded and saved, inputs that think; leaves the maths to `Blend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hrpo_patches.thinking import adjoint
from hrpo_thinking.blend import Blend
from hrpo_thinking.config import ThinkingConfig, record_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import LOOSE, ThinkingInputs
from hrpo_thinking.modules import ThinkingModule, make_projection, thinking_modules
from hrpo_thinking.parts import MODULE_PATTERN, MODULES, is_thinking_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


def check_modules_to_save(model: nn.Module, wanted: Sequence[str] | None) -> None:
    """Called by PEFT before it makes an adapter's trained copies: PEFT skips modules that the model does not have.

    Raises:
        InputError: `wanted` names a thinking module, and the model has none.
    """
    paths = [f".{path}" for path, _ in model.named_modules()]  # PEFT matches entries by the end of a path
    for entry in wanted or ():
        if is_thinking_parameter(f"{entry}.") and not any(path.endswith(f".{entry}") for path in paths):
            raise InputError(
                f"the adapter holds {entry}, and this model has no such module, so PEFT would lose it; load the "
                f"adapter with hrpo_patches.load_adapter(model, folder)."
            )


class ThinkingMixin(Blend, _Base):
    """What a patched model family gains: the thinking modules, their life, and the inputs of a forward that thinks."""

    declines_thinking = False  # loaded with thinking=False: thinking weights of a checkpoint are not loaded

    def add_thinking_modules(self, config: Any) -> None:
        """Called by a patched backbone's `__init__` before `post_init`; adds nothing unless `config.thinking` asks.

        A plain model's config is left as stock's, without a word about thinking.

        Raises:
            InputError: `config.thinking` holds a value that cannot work.
        """
        thinking = ThinkingConfig.of(config)
        if thinking is None:
            if config.thinking is False:
                self.declines_thinking = True
            if config.thinking in (None, False):  # another library's value is its own
                vars(config).pop("thinking", None)
            return
        config.thinking = record_of(thinking, config.thinking)
        inner = set()
        # Before `post_init`, which plans parallelism and initialises what it finds.
        for name, module in thinking_modules(config, thinking).items():
            self.add_module(name, module)
            inner |= {full for full, _ in (*module.named_modules(prefix=name), *module.named_parameters(prefix=name))}
        # The first also keeps quantizers away, which compare the end of a module's name (bitsandbytes, quanto) or of a
        # parameter's (torchao); the second holds under bf16 as well as fp16.
        self._keep_in_fp32_modules = inner
        self._keep_in_fp32_modules_strict = set(MODULES)
        # A stock checkpoint lacks them: no warning. One whose config says that it has them must have them.
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
            for name in MODULES:  # the model may be on a GPU already, or be evaluated
                getattr(self, name).to(self.get_input_embeddings().weight.device).train(self.training)
            return
        fresh = make_projection(self.config.hidden_size, thinking)
        own = getattr(self.thinking_projection, "original_module", self.thinking_projection)  # of PEFT's wrapper
        # Trained weights stay where their shapes fit: the other options change no weight.
        current = {name: p.shape for name, p in own.named_parameters()}
        if current != {name: p.shape for name, p in fresh.named_parameters()}:
            self.thinking_projection = fresh.to(self.thinking_residual_Lambda.Lambda.device)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ThinkingModule):  # transformers' own would draw W with std 0.02, and Λ not at all
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        missing = sorted(key for key in loading_info.missing_keys if is_thinking_parameter(key))
        whole = [key for key, _ in self.named_parameters() if is_thinking_parameter(key)]
        thinking = ThinkingConfig.of(self.config)
        claimed = thinking is not None and record_of(thinking, self.config.thinking)["in_checkpoint"]
        stray = sorted(key for key in loading_info.unexpected_keys if is_thinking_parameter(key))
        declined = getattr(self.base_model, "declines_thinking", False)
        if stray and thinking is None and not declined:
            raise InputError(
                f"this checkpoint holds thinking weights ({stray[0]}), and its config does not say that it thinks; "
                f"load it with thinking={{}} to use them, or with thinking=False to remove them."
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)  # removes what may be missing from the report
        if missing and (claimed or len(missing) < len(whole)):
            raise InputError(
                f"the checkpoint is to hold thinking weights, but {', '.join(missing)} is missing: it is damaged or "
                f"was saved without. To start all of them again, load it once with thinking=False and save that."
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        thinking = getattr(self.config, "thinking", None)
        if not isinstance(thinking, dict) or ThinkingConfig.of(self.config) is None:
            return super().save_pretrained(*args, **kwargs)
        self.config.thinking = thinking | {"in_checkpoint": True}  # of the file that is written, not of this model
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.thinking = thinking

    def think(
        self,
        embeds: Tensor,
        thinking: ThinkingInputs | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, ThinkingInputs, Tensor | None]:
        """Called by a patched forward before its layers: their inputs (B, L, d), what `credit` takes, and the last
        hidden states (B, L, d), if they were computed already.

        Raises:
            InputError: as `blend_thinking`, or the gradient cannot be taken as `thinking.bptt` asks.
        """
        if thinking is None:
            raise InputError(LOOSE)
        # First the states, without gradient, if they are missing or come from other weights; then the blend.
        if thinking.bptt is not None or thinking.states is None:
            thinking = adjoint.ready(self, embeds, thinking, attention_mask, position_ids)
        # For the exact gradient, prompts are read apart: the series then costs nothing for them.
        if thinking.bptt is not None and not self._asks_for_more(kwargs):
            hidden = adjoint.hidden_in_stretches(self, embeds, thinking, attention_mask, position_ids)
            if hidden is not None:
                return embeds, thinking, hidden
        return self.blend_thinking(embeds, thinking), thinking, None

    def _asks_for_more(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward was asked for what one forward alone can do, e.g. hidden states that hooks capture."""
        asked = any(value is not None and value is not False for value in kwargs.values())
        return bool(asked or self.config.output_hidden_states or self.config.output_attentions)

    def credit(self, hidden: Tensor, thinking: ThinkingInputs) -> Tensor:
        """Called by a patched forward after its last norm: the hidden states (B, L, d), through which a gradient flows
        back to the thoughts."""
        return hidden if thinking.bptt is None else adjoint.credited(self, hidden, thinking)
