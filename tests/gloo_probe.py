"""Run as a program: plain training in two gloo processes, with or without hrpo_patches; saves what came out.

`python gloo_probe.py OUT stock|patched` starts the two, one after the other for each kind of training.
"""

import os
import sys
from pathlib import Path

if sys.argv[2] == "patched":
    import hrpo_patches  # noqa: F401

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}


def fresh(family):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(config(**SHAPE, **HEADS)).train()


def steps(model, optimizer, rank, count=2):
    """Train; every process sees words of its own."""
    for step in range(count):
        words = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        model(input_ids=words, labels=words, use_cache=False).loss.backward()
        optimizer.step()


def ddp(family, rank):
    model = fresh(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model)
    steps(wrapped, torch.optim.AdamW(wrapped.parameters(), 1e-2), rank)
    return model.state_dict()


def fsdp1(family, rank):
    wrapped = FullyShardedDataParallel(fresh(family), device_id=torch.device("cpu"), use_orig_params=True)
    steps(wrapped, torch.optim.AdamW(wrapped.parameters(), 1e-2), rank)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {name: value.clone() for name, value in wrapped.module.state_dict().items()}


def sharded(family):
    model = fresh(family).to(torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def fsdp2(family, rank):
    """Two steps, then model and optimizer saved and put into fresh ones, then two more."""
    model, optimizer = sharded(family)
    steps(model, optimizer, rank)
    weights, moments = get_state_dict(model, optimizer)
    model, optimizer = sharded(family)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    steps(model, optimizer, rank)
    return {name: value.full_tensor() for name, value in get_model_state_dict(model).items()}


def worker(rank, out, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for family in FAMILIES:
        for kind in (ddp, fsdp1, fsdp2):
            results |= {f"{family}.{kind.__name__}.{name}": v.clone() for name, v in kind(family, rank).items()}
    if rank == 0:
        save_file({name: value.contiguous() for name, value in results.items()}, out)
    dist.barrier()
    os._exit(0)  # what counts is saved, and a torch thread that is still there now and then aborts an orderly exit


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.multiprocessing.spawn(worker, (str(out), str(out.with_suffix(".store"))), nprocs=2)
