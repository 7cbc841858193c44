"""Is thinking right on this device? Prints one line of JSON per check: its value, its bound, whether it holds.

    PYTHONPATH=tests python tests/gpu/correct.py

The model is tiny and random, in float32 where a number is compared; on a machine without a GPU the CPU is the device.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import hrpo_patches

# isort: split
import torch
from rollouts import bias, ragged, replayed_logps, sample, sampled_logps
from runs import assert_all_thinking_parts_moved, small_trainer
from safetensors.torch import load_file
from tiny import FAMILIES, byte_tokenizer, tiny_model

from hrpo_patches.device import run_device
from hrpo_patches.engines.batches import Decoding, complete
from hrpo_patches.models.base import open_model

FELT = {"r_min": 0.5, "r_max": 0.9}
DEVICE, TOKENIZER = run_device(), byte_tokenizer()
GPU = DEVICE.type != "cpu"
torch.backends.cuda.matmul.allow_tf32 = False


def felt(family="llama", dtype=torch.float32, **options):
    return tiny_model(family, thinking=FELT | options).to(DEVICE, dtype).eval()


def replay_is_the_rollout(family):
    """The largest difference of a log-probability, and how many times larger it is with states shifted by one."""
    model, inputs = felt(family), ragged(TOKENIZER).to(DEVICE)
    out = sample(model, TOKENIZER, inputs)
    sampled, biases = sampled_logps(out, inputs), bias(TOKENIZER)
    real = torch.isfinite(sampled)
    right, wrong = (
        (replayed_logps(model, out, inputs, states=states, biases=biases) - sampled)[real].abs().max().item()
        for states in (out.thinking_states, out.thinking_states.roll(-1, 1))
    )
    yield f"replay = rollout, {family}", right, 1e-3
    yield f"replay = rollout, over that of shifted states, {family}", right / wrong, 0.1


def device_is_the_cpu():
    """Log-probabilities and gradients of a replay, here and on the CPU, for each depth of the gradient."""
    torch.manual_seed(0)
    given = [torch.randint(3, 200, (2, 14)), torch.ones(2, 14, dtype=torch.long)]
    states, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
    for residual in ("projection", "embedding"):
        for bptt in (0, 2, "exact", "sequential"):
            both = []
            model = tiny_model("qwen2", thinking=FELT | {"residual": residual})
            for device in ("cpu", DEVICE):
                model.to(device).zero_grad()
                thoughts = {"thinking_states": states.to(device), "thinking_mask": mask.to(device)}
                out = hrpo_patches.replay_forward(model, *(one.to(device) for one in given), bptt=bptt, **thoughts)
                out.logits[:, -9:].float().log_softmax(-1).square().mean().backward()
                gradient = model.model.thinking_residual_gate_i.weight.grad
                both.append([out.logits.detach().cpu(), gradient.detach().cpu().clone()])
            off = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*both, strict=True))
            yield f"device = CPU, {residual}, bptt={bptt}", off, 2e-3


def series_is_the_decoding():
    """The gradient of the projection by the adjoint series, against decoding one by one."""
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 200, (2, 20), device=DEVICE), torch.ones(2, 16, dtype=torch.bool, device=DEVICE)
    model, gradients = felt("qwen3").train(), []
    for bptt in ("exact", "sequential"):
        model.zero_grad()
        out = hrpo_patches.replay_forward(model, ids, thinking_mask=mask, bptt=bptt, bptt_tolerance=1e-8)
        out.logits.float().log_softmax(-1).square().mean().backward()
        gradients.append(model.model.thinking_projection.weight.grad.clone())
    yield "exact = sequential", ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(), 1e-3


def engines_say_the_same():
    """Tokens that differ from those of `generate` with a dynamic cache."""
    model = felt("qwen2")
    ids = [TOKENIZER(text)["input_ids"] for text in ("What is 3?", "Hi", "abc")]
    plain, packed = (
        dict(pair for batch, rows in complete(model, TOKENIZER, ids, way) for pair in zip(batch, rows, strict=True))
        for way in (Decoding(12, True, batch_size=3, engine=engine) for engine in ("generate", "continuous"))
    )
    yield "continuous = generate", float(sum(plain[i] != packed[i] for i in plain)), 0.5
    inputs = ragged(TOKENIZER).to(DEVICE)
    options = {"tokenizer": TOKENIZER, "thinking": True, "do_sample": False, "max_new_tokens": 12}
    dynamic, static = (
        model.generate(**inputs, **options, **cache) for cache in ({}, {"cache_implementation": "static"})
    )
    yield "static cache = dynamic", (dynamic != static).float().sum().item(), 0.5


def training_learns(folder):
    """Whether every thinking part moves in bf16, with checkpointing and each engine; losses must be finite."""
    ways = {"generate": {}, "continuous": {"use_transformers_continuous_batching": True}}
    if not GPU:
        ways["continuous"]["transformers_continuous_batching_config"] = {"num_blocks": 64, "max_batch_tokens": 128}
    for name, options in ways.items():
        given = {"bf16": True, "gradient_checkpointing": True, "use_cpu": not GPU, "max_steps": 2, "temperature": 1.0}
        trainer = small_trainer(folder / name, **given | options)
        before = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
        trainer.train()
        assert_all_thinking_parts_moved(trainer, before)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        finite = all(row["loss"] == row["loss"] and row["projection/grad_norm"] > 0 for row in rows)
        yield f"training in bf16, {name}", float(not finite), 0.5


def a_resumed_run_is_the_whole_one(folder):
    """The largest difference of a weight between four steps, and two and two; as large as of four and four again."""
    files = []
    for name, steps in (("whole", (4,)), ("again", (4,)), ("resumed", (2, 4))):
        for count in steps:
            given = {"use_cpu": not GPU, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            trainer = small_trainer(folder / name, max_steps=count, temperature=1.0, **given)
            trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-2") if count != steps[0] else None)
        files.append(load_file(folder / name / "checkpoint-4" / "adapter_model.safetensors"))
    again, resumed = (max((files[0][key] - one[key]).abs().max().item() for key in one) for one in files[1:])
    yield "resumed = whole", resumed, max(1e-6, 5 * again)  # sums of a GPU are not the same twice
    tiny_model("llama", thinking=False).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    model, _ = open_model(str(folder / "base"))
    yield "open_model is on another device", float(model.device.type != DEVICE.type), 0.5


def fused_head_is_the_plain_one(folder):
    """Log-probabilities of TRL's fused head (Triton, on a GPU) against the plain ones, while thinking."""
    trainer = small_trainer(folder / "fused", use_cpu=not GPU, beta=0.0, temperature=1.0)
    scores, plain = [], trainer._score_plain

    def both(*given):
        scores.append([score(*given)[0].detach() for score in (plain, trainer._score_fused)])
        return plain(*given)

    trainer._score_plain, trainer._has_fused_head = both, lambda model: False
    trainer.train()
    yield "fused head = plain head", max((a - b).abs().max().item() for a, b in scores), 1e-3


def main():
    failed = 0
    print(json.dumps({"device": str(DEVICE), "torch": torch.__version__}), flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checks = [(replay_is_the_rollout, family) for family in FAMILIES]
        checks += [(device_is_the_cpu,), (series_is_the_decoding,), (engines_say_the_same,)]
        checks += [(training_learns, folder), (a_resumed_run_is_the_whole_one, folder)]
        checks += [(fused_head_is_the_plain_one, folder)]
        for check, *given in checks:
            try:
                for what, value, bound in check(*given):
                    holds = value < bound
                    failed += not holds
                    print(json.dumps({"check": what, "value": value, "bound": bound, "holds": holds}), flush=True)
            except Exception:
                failed += 1
                print(
                    json.dumps({"check": check.__name__, "holds": False, "error": traceback.format_exc()}), flush=True
                )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
