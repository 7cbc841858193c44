"""Weights that several processes hold in shards (torch's FSDP2): how they are sharded, and whole for a while.

It knows modules and torch's units, nothing of trainers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear

from hrpo_patches.thinking.backbone import temporarily
from hrpo_thinking.modules import ThinkingModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def in_units(model: nn.Module) -> bool:
    """Whether the weights are in shards by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def partitioned(model: nn.Module) -> bool:
    """Whether the weights are in shards by DeepSpeed's ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def in_shards(model: nn.Module) -> bool:
    """Whether no process holds the weights whole, so that all must call the same modules in the same order."""
    return in_units(model) or partitioned(model)


@contextmanager
def thinking_stays_float32() -> Iterator[None]:
    """Within, `fully_shard` makes each thinking module a unit of its own, which computes in float32."""
    stock = fsdp.fully_shard  # accelerate looks it up in the module when it prepares a model

    def shard(module: Any, **options: Any) -> Any:
        modules = module if isinstance(module, (list, tuple)) else [module]
        for part in [part for given in modules for part in given.modules()]:
            # The policy of the rest would cast these weights to bf16 in every forward.
            if isinstance(part, ThinkingModule) and not isinstance(part, FSDPModule):
                stock(part, **options | {"mp_policy": MixedPrecisionPolicy(), "reshard_after_forward": False})
        sharded = stock(module, **options)
        for given in modules:
            given._gives_back = bool(options.get("reshard_after_forward"))  # a root that is not told keeps its weights
        return sharded

    with temporarily(fsdp, fully_shard=shard):
        yield


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, each process holds all weights, and its forwards wait for no other's; every process must enter.

    Without it, a process whose completions end early would leave the others waiting for its shards.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if hasattr(model, "generate_batch") and "generate_batch" not in vars(model):  # once: it wraps what is there
        # It runs parts of the model, and the root must come first.
        fsdp.register_fsdp_forward_method(model, "generate_batch")
    for unit in units:
        unit.unshard()  # a collective, in the order in which all processes have the modules
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        give_back(model)


def plain(tensor: Tensor) -> Tensor:
    """A tensor, also one in shards, as an ordinary one on every process; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weight_of(module: Any) -> Tensor:
    """A module's weight within a forward; whole until the backward where its unit had given it back already."""
    if isinstance(module.weight, DTensor):
        module.unshard()
    return module.weight


def head_of(model: PreTrainedModel) -> Any:
    """What makes logits (..., V) of states (..., d), also outside of a forward.

    In shards, a linear head is asked for its weight instead of called: its unit, which is also the last norm's, would
    wait for that norm's forward.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return head
    if isinstance(head, FSDPModule):
        return lambda states: linear(states, weight_of(head), head.bias)
    if isinstance(head.weight, DTensor):  # a reference's, which is one unit, and wants no gradient
        weight = plain(head.weight.detach())
        bias = plain(head.bias.detach()) if head.bias is not None else None
        return lambda states: linear(states.to(weight.dtype), weight, bias)
    return head


def unsharded(module: nn.Module) -> None:
    """Gather the weights of a module of FSDP2's before a backward that begins at its output.

    The last norm shares a unit with the head, which is gathered where a backward comes to the head, and given back
    where it leaves the norm: a second one that begins between the two would read memory that is no longer there.
    """
    if isinstance(module, FSDPModule):
        module.unshard()


def like(value: Tensor, other: Tensor) -> Tensor:
    """An ordinary tensor that all processes have, in shards as `other` is, if it is."""
    value = value.to(other.device, other.dtype)
    # Every process has the whole value (`src_data_rank=None`), so that nothing is sent.
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


def give_back(model: nn.Module) -> None:
    """Reshard all FSDP units: weights that were gathered may be outdated."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            gives_back = getattr(module, "_gives_back", False)
            module.set_reshard_after_forward(True, recurse=False)  # or a unit of which a part was called would not
            module.reshard()
            module.set_reshard_after_forward(gives_back, recurse=False)


def anywhere(model: nn.Module, flags: Tensor) -> Tensor:
    """Flags (n,) that are set in any process, where the processes of `model` must do the same; else `flags`."""
    return largest(flags.int()).bool() if in_shards(model) else flags


def largest(values: Tensor) -> Tensor:
    """The largest of each value over all processes."""
    values = values.clone()
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values
