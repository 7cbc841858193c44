"""What a trainer does otherwise where weights are in shards, and where a save fails.

Its checkpoints are those that one process writes, so that a run is resumed with as many processes as there are, in
shards or not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.operations import recursively_apply
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Trainer

from hrpo_patches.thinking.backbone import temporarily
from hrpo_patches.thinking.shards import give_back, in_shards, in_units, largest, like, plain, thinking_stays_float32
from hrpo_thinking.errors import InputError, SaveError, require

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    from hrpo_patches.training.config import ThinkingArguments

logger = logging.getLogger(__name__)

_Trainer: Any = Trainer
_TORCH_SAVE = ("iostream", "inline_container")  # of the errors by which torch.save says that it could not write


class InShards(_Trainer):
    """A `Trainer` whose model may be in shards.

    Raises:
        InputError: it is told to use FSDP's first version, or ZeRO-3 with the reference `start` or truncated BPTT.
            ZeRO-3 decodes for the exact gradient (`check_sharding`).
        SaveError: in training, if a checkpoint cannot be written.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
        check_sharding(self.args, fsdp, deepspeed)
        if fsdp is None:
            return
        prepare = self.accelerator.prepare  # calls `fully_shard`, with one precision for all units

        def prepare_thinking(*args: Any, **kwargs: Any) -> Any:
            with thinking_stays_float32():
                return prepare(*args, **kwargs)

        self.accelerator.prepare = prepare_thinking

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch.save has no error of its own; any other RuntimeError is a fault, not a full disk.
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE):
                raise
            name, why = f"checkpoint-{self.state.global_step}", " ".join(str(error).split())
            raise SaveError(
                f"{name} could not be written to {self.args.output_dir} ({why}); those before it are complete: make "
                f"room, and resume from the last one (--resume_from_checkpoint latest)."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not in_units(self.model):
            return super().save_model(output_dir, _internal_call)
        weights = self.model.state_dict(keep_vars=True)  # so that tied weights are the same objects
        ordinary = {id(weight): plain(weight.detach()).cpu() for weight in weights.values()}  # tied ones once
        state = {name: ordinary[id(weight)] for name, weight in weights.items()}
        if self.args.should_save:  # all processes have gathered, one writes
            self._save(output_dir, state_dict=state)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not in_units(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        state = recursively_apply(lambda value: plain(value).cpu(), self.optimizer.state_dict())
        # Where FSDP is enabled, transformers writes shards; told that it is not, it writes the state that it is given.
        with temporarily(self, is_fsdp_enabled=False), temporarily(self.optimizer, state_dict=lambda: state):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not in_units(self.model):
            with _whole_files(checkpoint):
                return super()._load_optimizer_and_scheduler(checkpoint)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        load = self.optimizer.load_state_dict

        def load_in_shards(state: dict[str, Any]) -> None:
            for index, moments in state["state"].items():
                for name, value in moments.items():
                    if value.shape == parameters[index].shape:  # not the step, which is a number
                        moments[name] = like(value, parameters[index].detach())
            load(state)

        stock = temporarily(self, is_fsdp_enabled=False), temporarily(self.optimizer, load_state_dict=load_in_shards)
        with _whole_files(checkpoint), stock[0], stock[1]:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _whole_files(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if not in_units(self.model):
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not in_units(self.model):
            with _whole_files(resume_from_checkpoint):
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
        give_back(self.model)  # or the units would keep the old weights that they hold whole
        peft = is_peft_model(self.model)
        named = "adapter_model.safetensors" if peft else "model*.safetensors"
        files = sorted(Path(resume_from_checkpoint).glob(named))
        with _whole_files(resume_from_checkpoint):
            saved = {name: value for file in files for name, value in load_file(file).items()}
        own = get_peft_model_state_dict(self.model) if peft else self.model.state_dict(keep_vars=True)
        # safetensors holds one of several names of a weight.
        tied = {name for name in own.keys() - saved.keys() if any(own[name] is own.get(other) for other in saved)}
        other = ", ".join(sorted(saved.keys() ^ (own.keys() - tied))[:1])
        require(not other, f"{resume_from_checkpoint} is not of this model: {other} is in one of them only.")
        with torch.no_grad():
            for name, value in saved.items():
                own[name].copy_(like(value, own[name].detach()))


@contextmanager
def _whole_files(checkpoint: str | None) -> Iterator[None]:
    """Within, a file of the checkpoint that cannot be read is an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, UnpicklingError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot resume from {checkpoint}: a file is damaged or belongs to another run ({why}). Use another."
        ) from error


def check_sharding(
    args: ThinkingArguments, fsdp: FullyShardedDataParallelPlugin | None, deepspeed: DeepSpeedPlugin | None
) -> None:
    """Raise `InputError` for a run that cannot be done in shards as accelerate's two plug-ins say, None each."""
    thinks, zero3 = args.residual is not None, deepspeed is not None and deepspeed.zero_stage == 3
    version = fsdp.fsdp_version if fsdp is not None else 2
    require(
        not thinks or version == 2,
        f"FSDP's version {version} was asked for, and thinking modules are sharded by FSDP2; set fsdp_version: 2, as "
        f"in configs/accelerate/fsdp2.yaml.",
    )
    require(
        not zero3 or not args.from_start,
        "reference='start' puts other weights in place of today's for a while, which ZeRO-3 does not allow; use "
        "ZeRO-2 or FSDP2, or reference='base'.",
    )
    if not (zero3 and thinks):
        return
    require(
        args.bptt in (None, 0, "exact", "sequential"),
        f"bptt={args.bptt} is not supported by ZeRO-3; use bptt=exact, bptt=0, ZeRO-2 or FSDP2.",
    )
    if args.bptt in (None, "exact"):  # a series of products; ZeRO-3 gives a layer's weights back after the first
        args.bptt = "sequential"
        logger.warning("ZeRO-3: bptt=exact is computed by decoding the thoughts one by one (bptt=sequential).")


def as_long_as_any(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, width: int
) -> tuple[Tensor, Tensor, int]:
    """A batch (B, L) and its mask, padded to the longest prompt and the longest completion of any process's.

    Args:
        model: the batch comes back as it is unless the model is in shards.
        input_ids, attention_mask: (B, L), completions in the last `width` columns.
        width: of the completions.
    """
    if not in_shards(model):
        return input_ids, attention_mask, width
    own = torch.tensor([input_ids.shape[1] - width, width], device=input_ids.device)
    more = tuple((largest(own) - own).tolist())
    return pad(input_ids, more), pad(attention_mask, more), width + more[1]
