"""What both trainers save beside weights: how the model thinks, its forced thoughts, and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from hrpo_patches.models.card import write_card
from hrpo_patches.models.record import THINKING_FILE, save_pauses, save_thinking
from hrpo_patches.thinking.backbone import causal_lm
from hrpo_patches.training.several import InShards


class SavesThoughts(InShards):
    """A trainer whose saves say how the model thinks.

    Attributes:
        method: by which it trains, for the card.
    """

    method = ""
    _tag_names: list[str] = []  # noqa: RUF012 - TRL's own type
    _fillers: list[int] = []  # noqa: RUF012 - the ids of the forced thoughts that a completion begins with

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder, fillers = str(output_dir or self.args.output_dir), self._fillers
        if self.args.residual is not None:
            save_thinking(self.accelerator.unwrap_model(self.model), folder)
            self.write_card(folder)
        elif fillers and is_peft_model(self.model):  # a full model's own file says so already
            save_pauses(len(fillers), fillers[0], folder)

    def write_card(self, folder: str | Path) -> None:
        """Write the model card of what was saved in `folder`, if it thinks."""
        if (Path(folder) / THINKING_FILE).is_file():
            base = causal_lm(self.accelerator.unwrap_model(self.model)).config._name_or_path
            write_card(folder, base, self.method, list(self._tag_names))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's and transformers', but that of a model that thinks says so (`write_card`)."""
        if self.args.residual is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card(self.args.output_dir)
