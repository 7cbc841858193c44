"""The KL reference `start`: the model that training began from, thinking as it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hrpo_patches.thinking.shards import give_back, like
from hrpo_thinking.errors import require

START_FILE = "reference_start.safetensors"


class StartReference(TrainerCallback):
    """Keeps the trainable weights of a model as they are now, and puts them in place of today's for a while.

    A run writes them into its folder because a process that resumes it may draw others before it loads a checkpoint.

    Args:
        model: unwrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model as it was, in evaluation mode."""
        training = self.model.training
        today = self._swap(self.weights)
        self.model.eval()
        try:
            yield
        finally:
            self._swap(today)
            self.model.train(training)

    def _swap(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make these the model's weights; returns the ones that they replace."""
        give_back(self.model)
        replaced = {}
        for name, value in weights.items():
            parameter = self.model.get_parameter(name)
            if isinstance(parameter, DTensor):  # its unit reads the memory that it began with
                replaced[name] = parameter.detach().clone()
                parameter.detach().copy_(value)
            else:
                # `.data`: the parameter that the optimizer holds stays the same object, and nothing is copied.
                replaced[name], parameter.data = parameter.data, value.to(parameter.device)
        return replaced

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        file = Path(str(args.output_dir)) / START_FILE
        if state.global_step == 0 and state.is_world_process_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.cpu().contiguous() for name, weight in self.weights.items()}, file)
        elif state.global_step:
            self._read(file)
        # The model is on its device, and in shards, only by now.
        for name, weight in self.weights.items():
            self.weights[name] = like(weight, self.model.get_parameter(name).detach())

    def _read(self, file: Path) -> None:
        text = (
            f"cannot resume with reference='start': {file} is missing. A run writes it to its output_dir when it "
            f"starts; set output_dir to that folder."
        )
        require(file.is_file(), text)
        weights = load_file(file)
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        same = {name: weight.shape for name, weight in weights.items()} == shapes
        require(same, f"{file} holds other weights than this run trains: it belongs to another run.")
        self.weights = {name: weight.to(self.weights[name]) for name, weight in weights.items()}
