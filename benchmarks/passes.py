"""What credit through time costs: a trainer's loss and backward by number of passes, against plain GRPO's.

Every round takes all kinds in turn, from another one on; ratios are taken within a round. Each kind has its own
trainer on its own copy of the model; all replay the same completions, every token of which thinks. Memory is the
growth of the process's resident memory over a step, at its peak (Linux). With --drift it measures instead by how much
the values of several passes differ from those of one, in float32 and bfloat16.
"""

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import hrpo_patches  # noqa: F401 - before transformers

# isort: split
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hrpo_patches import HRPOConfig, HRPOTrainer, ThinkingConfig
from hrpo_patches.commands.main import said
from hrpo_patches.models.base import load_model
from hrpo_patches.thinking.replay import replay_forward

KINDS = {"none": ("none", 1)} | {f"k = {k}": ("thinking", k) for k in (1, 2, 4, "all")}
QUESTION = "A farmer has {} hens. Each hen lays {} eggs a week. How many eggs does the farmer have after three weeks?"


def trainer_of(kind: str, args: argparse.Namespace, folder: str) -> HRPOTrainer:
    """A trainer with LoRA on a fresh copy of the model."""
    residual, passes = KINDS[kind]
    residual = args.residual if residual != "none" else residual
    model, tokenizer = load_model(
        args.model_name, ThinkingConfig(residual) if residual != "none" else None, torch.float32
    )
    config = HRPOConfig(
        output_dir=folder,
        residual=residual,
        replay_passes=passes,
        per_device_train_batch_size=args.batch,
        num_generations=args.batch,
        max_completion_length=8,
        beta=0.0,
        report_to="none",
        bf16=False,
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
    )
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    data = Dataset.from_dict({"prompt": ["x"] * args.batch})
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    trainer = HRPOTrainer(model, rewards, config, data, processing_class=tokenizer, peft_config=lora)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batch_of(model, tokenizer, args: argparse.Namespace, thoughts: int) -> dict:
    """A scored rollout: prompts, and completions of `thoughts` thinking tokens."""
    prompts = [QUESTION.format(n, 7 - n) for n in range(2, 2 + args.batch)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        tokenizer=tokenizer,
        thinking=True,
        min_new_tokens=thoughts,
        max_new_tokens=thoughts,
        do_sample=True,
        top_k=0,
        return_dict_in_generate=True,
    )
    completions = out.sequences[:, inputs["input_ids"].shape[1] :]
    return {
        "prompt_ids": inputs["input_ids"],
        "prompt_mask": inputs["attention_mask"],
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.linspace(-1, 1, args.batch),
        "num_items_in_batch": torch.tensor(float(completions.numel())),
        "thinking_states": out.thinking_states,
        "thinking_mask": torch.ones_like(completions, dtype=torch.bool),
    }


def resident(field: str) -> float:
    """GiB of this process: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def settle() -> None:
    """Give back what was freed, and let the peak of the resident memory begin here."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(trainer: HRPOTrainer, batch: dict) -> tuple[float, float]:
    """Seconds and peak memory (GiB, over what was there before) of one loss with its backward."""
    settle()
    before, started = resident("VmRSS"), time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    seconds, peak = time.perf_counter() - started, resident("VmHWM") - before
    trainer.model.zero_grad(set_to_none=True)
    return seconds, peak


def costs(args: argparse.Namespace, thoughts: int) -> dict:
    """All rounds at one number of thoughts."""
    kinds = list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: trainer_of(kind, args, folder) for kind in kinds}
        one = trainers["k = 1"]
        started = time.perf_counter()
        batch = batch_of(one._base_model().eval(), one._tokenizer, args, thoughts)
        rollout = time.perf_counter() - started
        one.model.train()
        rounds = []
        for n in track(range(args.rounds), description=f"{thoughts} thoughts"):
            order = kinds[n % len(kinds) :] + kinds[: n % len(kinds)]
            rounds.append({kind: measure(trainers[kind], batch) for kind in order})
    return {"thoughts": thoughts, "rollout_seconds": rollout, "rounds": rounds}


def show(found: dict) -> None:
    """Print one number of thoughts as a table."""
    title = f"{found['thoughts']} thoughts; their rollout takes {found['rollout_seconds']:.1f} s"
    table = Table(title=title)
    for column in ("", "seconds (range)", "of none (range)", "peak GiB", "of none"):
        table.add_column(column)
    for kind in KINDS:
        seconds, peaks = zip(*(row[kind] for row in found["rounds"]), strict=True)
        slower = [row[kind][0] / row["none"][0] for row in found["rounds"]]
        larger = [row[kind][1] / row["none"][1] for row in found["rounds"]]
        table.add_row(
            kind,
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{statistics.median(slower):.2f} ({min(slower):.2f} to {max(slower):.2f})",
            f"{statistics.median(peaks):.2f}",
            f"{statistics.median(larger):.2f}",
        )
    Console().print(table)


@torch.no_grad()
def drift(args: argparse.Namespace) -> dict:
    """The largest and the mean difference between a pass's log-probabilities and one pass's, by dtype and passes."""
    found: dict[str, dict] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_model(args.model_name, ThinkingConfig(r_min=args.r_min, r_max=args.r_max), dtype)
        batch = batch_of(model.eval(), tokenizer, args, args.thoughts[0])
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        states = {"thinking_states": batch["thinking_states"], "thinking_mask": batch["thinking_mask"]}
        width = batch["completion_ids"].shape[1]

        def logps(k, model=model, ids=ids, mask=mask, states=states, width=width):
            logits = replay_forward(model, ids, mask, passes=k, logits_to_keep=width + 1, **states).logits[:, :-1]
            return logits.float().log_softmax(-1).gather(-1, ids[:, -width:, None])[..., 0]

        one = logps(1)
        for k in (2, 4, 8, "all"):
            difference = (logps(k) - one).abs()
            found[f"{str(dtype).removeprefix('torch.')}, k = {k}"] = {
                "largest": difference.max().item(),
                "mean": difference.mean().item(),
            }
    return found


def main(flags: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name", default="smollm2-135m", help="hub id, folder, or smollm2-135m")
    parser.add_argument("--thoughts", nargs="+", type=int, default=[16, 128], help="thinking tokens of a completion")
    parser.add_argument("--batch", type=int, default=4, help="completions in a step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with all kinds")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of the layers")
    parser.add_argument(
        "--residual", default="projection", choices=("projection", "embedding"), help="of the thoughts"
    )
    parser.add_argument("--drift", action="store_true", help="measure values instead of costs")
    parser.add_argument("--r_min", type=float, default=0.5, help="lower end of λ, for --drift")
    parser.add_argument("--r_max", type=float, default=0.9, help="upper end of λ, for --drift")
    parser.add_argument("--out", type=Path, default=None, help="also write the numbers to this JSON file")
    args = parser.parse_args(flags)
    if args.drift:
        record: dict = drift(args)
        for name, values in record.items():
            print(f"{name}: largest {values['largest']:.2e}, mean {values['mean']:.2e}")
    else:
        record = {"costs": [costs(args, thoughts) for thoughts in args.thoughts]}
        for found in record["costs"]:
            show(found)
    if args.out:
        record |= {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "options": vars(args) | {"out": None},
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(said(main))
