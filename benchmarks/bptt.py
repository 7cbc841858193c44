"""What backpropagation through thoughts costs: a trainer's loss and backward by `bptt`, against plain GRPO's.

Every round takes all kinds in turn, from another one on; ratios are taken within a round. Each kind has its own
trainer on its own copy of the model; all replay the same completions, every token of which thinks. Memory is taken in
a step of its own after the rounds: the growth of the process's resident memory, at its peak (Linux).
With --drift it measures instead by how much the values of states that are made again in parallel differ from the
rollout's, in float32 and bfloat16.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import hrpo_patches  # noqa: F401 - before transformers

# isort: split
import torch
from datasets import Dataset
from measuring import device, device_name, measured, timed
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hrpo_patches import HRPOConfig, HRPOTrainer, ThinkingConfig
from hrpo_patches.commands.main import exit_status
from hrpo_patches.models.base import load_model
from hrpo_patches.thinking.replay import replay_forward

PLAIN, PUBLISHED = "residual = none", "bptt = 0"
KINDS: dict[str, int | str | None] = {PLAIN: None} | {f"bptt = {k}": k for k in (0, 1, 4, "exact", "sequential")}
QUESTION = "A farmer has {} hens. Each hen lays {} eggs a week. How many eggs does the farmer have after three weeks?"


def trainer_of(kind: str, args: argparse.Namespace, folder: str) -> HRPOTrainer:
    """A trainer with LoRA on a fresh copy of the model."""
    bptt = KINDS[kind]
    residual = args.residual if bptt is not None else "none"
    thinking = ThinkingConfig(residual, r_min=args.r_min, r_max=args.r_max) if bptt is not None else None
    if thinking is not None and residual == "projection":
        thinking.residual_scale = args.residual_scale
    torch.manual_seed(0)
    model, tokenizer = load_model(args.model_name, thinking, torch.float32)
    config = HRPOConfig(
        output_dir=folder,
        residual=residual,
        bptt=bptt,
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


@torch.no_grad()
def share_thinking_weights(trainers: dict[str, HRPOTrainer]) -> None:
    """Let all trainers have the same weights: LoRA and thinking modules are drawn at random."""
    first = dict(trainers[PUBLISHED].model.named_parameters())
    for trainer in trainers.values():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and name in first:
                parameter.copy_(first[name])


def batch_of(model, tokenizer, args: argparse.Namespace, thoughts: int) -> dict:
    """A scored rollout: prompts, and completions of `thoughts` thinking tokens."""
    prompts = [QUESTION.format(n, 7 - n) for n in range(2, 2 + args.batch)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
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
        "advantages": torch.linspace(-1, 1, args.batch, device=model.device),
        "num_items_in_batch": torch.tensor(float(completions.numel()), device=model.device),
        "thinking_states": out.thinking_states,
        "thinking_mask": torch.ones_like(completions, dtype=torch.bool),
    }


def measure(trainer: HRPOTrainer, batch: dict) -> tuple[float, int]:
    """Seconds of one loss with its backward, and terms of the series."""
    trainer._metrics["train"].clear()
    seconds = timed(lambda: trainer.compute_loss(trainer.model, batch).backward())
    trainer.model.zero_grad(set_to_none=True)
    return seconds, int(trainer._metrics["train"].get("bptt/terms", [0])[0])


def peak_of(trainer: HRPOTrainer, batch: dict) -> float:
    """GiB that a step takes at its peak, over what was there before."""
    return measured(lambda: measure(trainer, batch))[1]


def costs(args: argparse.Namespace, thoughts: int) -> dict:
    """All rounds at one number of thoughts."""
    kinds = [kind for kind in KINDS if not args.bptt or not KINDS[kind] or str(KINDS[kind]) in args.bptt]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: trainer_of(kind, args, folder) for kind in kinds}
        share_thinking_weights(trainers)
        one = trainers[PUBLISHED]
        batch: dict = {}
        rollout = timed(lambda: batch.update(batch_of(one._base_model().eval(), one._tokenizer, args, thoughts)))
        one.model.train()
        rounds = []
        for n in track(range(args.rounds), description=f"{thoughts} thoughts"):
            order = kinds[n % len(kinds) :] + kinds[: n % len(kinds)]
            rounds.append({kind: measure(trainers[kind], batch) for kind in order})
        peaks = {kind: peak_of(trainers[kind], batch) for kind in kinds}
    return {"thoughts": thoughts, "rollout_seconds": rollout, "rounds": rounds, "peak_gib": peaks}


def show(found: dict) -> None:
    """Print one number of thoughts as a table."""
    title = f"{found['thoughts']} thoughts; their rollout takes {found['rollout_seconds']:.1f} s"
    table = Table(title=title)
    for column in ("", "seconds (range)", "of plain GRPO", "of bptt = 0 (range)", "peak GiB", "of bptt = 0", "terms"):
        table.add_column(column)
    for kind, peak in found["peak_gib"].items():
        seconds, terms = zip(*(row[kind] for row in found["rounds"]), strict=True)
        plain = [row[kind][0] / row[PLAIN][0] for row in found["rounds"]]
        slower = [row[kind][0] / row[PUBLISHED][0] for row in found["rounds"]]
        table.add_row(
            kind,
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{statistics.median(plain):.2f}",
            f"{statistics.median(slower):.2f} ({min(slower):.2f} to {max(slower):.2f})",
            f"{peak:.2f}",
            f"{peak / found['peak_gib'][PUBLISHED]:.2f}",
            str(max(terms)),
        )
    Console().print(table)


@torch.no_grad()
def drift(args: argparse.Namespace) -> dict:
    """The largest and the mean difference of log-probabilities from those of a replay, by dtype."""
    found: dict[str, dict] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_model(args.model_name, ThinkingConfig(r_min=args.r_min, r_max=args.r_max), dtype)
        batch = batch_of(model.eval().to(device()), tokenizer, args, args.thoughts[0])
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        states = {"thinking_states": batch["thinking_states"], "thinking_mask": batch["thinking_mask"]}
        width = batch["completion_ids"].shape[1]

        logps = []
        for stale in (False, True):  # the rollout's states, and those that the parallel forward makes of them
            logits = replay_forward(model, ids, mask, logits_to_keep=width + 1, stale=stale, **states).logits[:, :-1]
            logps.append(logits.float().log_softmax(-1).gather(-1, ids[:, -width:, None])[..., 0])
        difference = (logps[0] - logps[1]).abs()
        found[str(dtype).removeprefix("torch.")] = {
            "largest": difference.max().item(),
            "mean": difference.mean().item(),
        }
    return found


def main(flags: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name", default="smollm2-135m", help="hub id, folder, or smollm2-135m")
    parser.add_argument(
        "--thoughts", nargs="+", type=int, default=[16, 64, 128], help="thinking tokens of a completion"
    )
    parser.add_argument("--batch", type=int, default=4, help="completions in a step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with all kinds")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of the layers")
    parser.add_argument(
        "--residual", default="projection", choices=("projection", "embedding"), help="of the thoughts"
    )
    parser.add_argument("--drift", action="store_true", help="measure values instead of costs")
    parser.add_argument(
        "--bptt", nargs="+", choices=[str(k) for k in KINDS.values() if k], default=[], help="beside 0; by default all"
    )
    parser.add_argument("--r_min", type=float, default=ThinkingConfig.r_min, help="lower end of λ")
    parser.add_argument("--r_max", type=float, default=ThinkingConfig.r_max, help="upper end of λ")
    parser.add_argument("--residual_scale", default="unit", help="norm of the projected residual: unit or embedding")
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
            "device": device_name(),
            "options": vars(args) | {"out": None},
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
