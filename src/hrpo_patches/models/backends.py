"""The libraries that load and run a model, behind one class each, and which of them a run takes.

unsloth must be imported before transformers, so a command asks here first, and this imports neither.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrpo_patches.patching.overlay import check, installed_version
from hrpo_thinking.errors import InputError, PatchError
from hrpo_thinking.inputs import Depth

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from hrpo_patches.thinking.backbone import Model

# Where the `BACKEND` of each library is. A model may run on any of them that is imported; on transformers, if on no
# other, so that it is the last.
_HOMES = {"unsloth": "hrpo_patches.models.unsloth_backend", "transformers": "hrpo_patches.models.backends"}
BACKENDS = ("auto", "transformers", "unsloth")
NO_BPTT = (
    "unsloth's backward overwrites what its forward saved, so that a gradient cannot flow through the thoughts; use "
    "bptt=0 and states of today's weights, or transformers."
)


class Backend:
    """How a library loads a model, gives it an adapter, and runs it: transformers; others override what differs.

    Attributes:
        fused_head: whether TRL's fused LM head can call the backbone of its models.
        bptt: how far the gradient flows through thoughts unless a run says so; 0 where it cannot.
        own_checkpointing: whether its models do gradient checkpointing themselves.
        own_adapters: whether an adapter must be made by `add_adapter`, and not by a trainer from a PEFT config.
        packs: whether its models can generate in continuous batching.
    """

    fused_head = True
    bptt: Depth = "exact"
    own_checkpointing = False
    own_adapters = False
    packs = True

    def runs(self, model: Model) -> bool:
        """Whether `model` runs this library's forward."""
        return True

    def refuse_stranger(self, model: str | Model) -> None:
        """Raise `InputError` for a model, or the name of one, that the library's changes keep from running."""

    def load(self, source: str | Path, dtype: torch.dtype, max_seq_length: int, **options: Any) -> PreTrainedModel:
        """The base model, loaded with these `options` (`thinking`); `max_seq_length` is prompt and completion."""
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        return model

    def add_adapter(
        self, model: PreTrainedModel, lora: dict[str, Any], modules_to_save: list[str], seed: int
    ) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
        """A model with a fresh adapter (`lora` as peft.LoraConfig's), or the config that a trainer makes it from."""
        from peft import LoraConfig

        return model, LoraConfig(**lora, task_type="CAUSAL_LM")

    def finish_adapter(self, model: PeftModel, is_trainable: bool) -> PeftModel:
        """Make a model whose adapter PEFT has built ready, to be trained or to be used."""
        return model if is_trainable else model.eval()

    def set_training(self, model: Model, training: bool) -> None:
        """Put a model into training or evaluation mode, with all that this means in the library."""
        model.train(training)


BACKEND = Backend()


def backend_named(name: str) -> Backend:
    """The backend of that name; the library must be importable."""
    backend: Backend = import_module(_HOMES[name]).BACKEND
    return backend


def _imported() -> Iterator[Backend]:
    """The backends whose libraries this process has imported, transformers always and last."""
    return (backend_named(name) for name in _HOMES if name in sys.modules or name == "transformers")


def backend_of(model: Model) -> Backend:
    """The backend whose forward `model` runs (a causal language model, or PEFT around one)."""
    return next(backend for backend in _imported() if backend.runs(model))


def refuse_stranger(model: str | Model) -> None:
    """Raise `InputError` for a model, or the name of one, that another library's changes keep from running."""
    for backend in _imported():
        backend.refuse_stranger(model)


def choose_backend(name: str) -> tuple[str, str]:
    """("transformers" or "unsloth", why). Imports torch to ask for a GPU, and nothing else.

    Raises:
        InputError: the backend is unknown, or unsloth was asked for and cannot be used.
        PatchError: unsloth was asked for, and the patches do not fit the installed version.
    """
    if name not in BACKENDS:
        raise InputError(f"--backend must be auto, transformers or unsloth, not {name!r}.")
    if name == "transformers":
        return "transformers", "asked for"
    obstacle = _obstacle(refuse=name == "unsloth")
    if obstacle is None:
        return "unsloth", "asked for" if name == "unsloth" else "it is installed and a GPU is there"
    if name == "unsloth":
        raise InputError(f"--backend unsloth cannot be used: {obstacle}.")
    return "transformers", obstacle


def _obstacle(refuse: bool) -> str | None:
    """Why unsloth cannot be used here, or None; with `refuse`, a version without patches raises its own error."""
    if "unsloth" in sys.modules:
        return None
    if installed_version("unsloth") is None:
        return "unsloth is not installed (pip install 'hrpo_patches[unsloth]')"
    try:
        check("unsloth")
    except PatchError as error:
        if refuse:
            raise
        return str(error)
    import torch

    if not torch.cuda.is_available():
        return "no GPU is there"
    if "transformers" in sys.modules:
        return "transformers was imported first; import unsloth, or call start_backend, before it"
    return None


def start_backend(name: str) -> str:
    """Import unsloth if it is to be used, and say in one line what was chosen and why; returns the backend.

    Raises:
        InputError, PatchError: as `choose_backend`.
    """
    backend, why = choose_backend(name)
    if backend == "unsloth":
        import_module("unsloth")
    if not _said:
        label = f"{backend} {installed_version(backend)}"
        print(f"backend: {label} ({why})")
        _said.append(label)
    return backend


_said: list[str] = []
