"""What thinking costs in a whole step: rollout, loss with its backward, optimizer, against plain GRPO's.

Every round takes both kinds in turn, another one first each time; ratios are taken within a round. All completions
are of one length, so that both kinds do the same work. Memory is the growth over a step at its peak, of the GPU's or,
on a CPU, of the process's resident memory (Linux). With --vocabulary it measures instead how the loss's memory grows
with the vocabulary.
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
from bptt import QUESTION
from datasets import Dataset
from measuring import device_name, measured
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from hrpo_patches import HRPOConfig, HRPOTrainer, ThinkingConfig
from hrpo_patches.commands.main import exit_status
from hrpo_patches.models.base import load_model
from hrpo_patches.models.smollm2 import SMOLLM2

KINDS = ("none", "projection")
VOCABULARIES = (49_152, 151_936)  # SmolLM2's and Qwen2's


def trainer_of(model, tokenizer, residual: str, args: argparse.Namespace, folder: str) -> HRPOTrainer:
    """A trainer of LoRA in float32 that makes completions of one length."""
    config = HRPOConfig(
        output_dir=f"{folder}/{residual}",
        residual=residual,
        per_device_train_batch_size=args.batch,
        num_generations=args.batch,
        max_completion_length=args.length,
        generation_kwargs={"min_new_tokens": args.length},
        answer_start="<answer>",  # which no completion spells: all of it thinks
        beta=0.0,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
    )
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    rewards = [lambda completions, **_: [float(len(str(text)) % 3) for text in completions]]
    data = Dataset.from_dict({"prompt": [QUESTION.format(n, 7 - n) for n in range(2, 6)]})
    trainer = HRPOTrainer(model, rewards, config, data, processing_class=tokenizer, peft_config=lora)
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: HRPOTrainer, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and peak memory (GiB, over what was there before) of one step."""
    rows = [{"prompt": QUESTION.format(3, 4)}] * args.batch

    def work() -> None:
        trainer.training_step(trainer.model, rows, None)
        trainer.optimizer.step()

    seconds, peak = measured(work)
    trainer.model.zero_grad(set_to_none=True)
    return seconds, peak


def steps(args: argparse.Namespace) -> list[dict]:
    """All rounds, after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for kind in KINDS:
            thinking = ThinkingConfig(kind) if kind != "none" else None
            model, tokenizer = load_model(args.model_name, thinking, torch.float32)
            trainers[kind] = trainer_of(model, tokenizer, kind, args, folder)
        rounds = []
        for n in track(range(args.rounds + 1), description="Steps"):
            order = KINDS if n % 2 else KINDS[::-1]
            rounds.append({kind: step(trainers[kind], args) for kind in order})
    return rounds[1:]


def show(rounds: list[dict]) -> None:
    """Print the rounds as a table."""
    table = Table(title="One step")
    for column in ("", "seconds (range)", "of none (range)", "peak GiB (range)", "of none (range)"):
        table.add_column(column)
    for kind in KINDS:
        seconds, peaks = zip(*(row[kind] for row in rounds), strict=True)
        slower, larger = ([row[kind][i] / row["none"][i] for row in rounds] for i in (0, 1))
        columns = ((seconds, 2), (slower, 3), (peaks, 2), (larger, 3))
        table.add_row(kind, *(f"{statistics.median(x):.{n}f} ({min(x):.{n}f} to {max(x):.{n}f})" for x, n in columns))
    Console().print(table)


def vocabularies(args: argparse.Namespace) -> list[dict]:
    """Peak memory (GiB) of a loss with its backward, by vocabulary: the smallest model of SmolLM2's width."""
    _, tokenizer = load_model(SMOLLM2, None, torch.float32)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for size in VOCABULARIES:
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape, **heads, thinking={}))
            trainers[size] = trainer_of(model, tokenizer, "projection", args, f"{folder}/{size}")
        for n in track(range(args.rounds + 1), description="Losses"):
            row = {size: loss(trainers[size], args) for size in VOCABULARIES[:: 1 if n % 2 else -1]}
            found += [row] if n else []
    return found


def loss(trainer: HRPOTrainer, args: argparse.Namespace) -> float:
    """Peak memory (GiB, over what was there before) of one loss with its backward."""
    torch.manual_seed(0)
    width, size = trainer.model.config.hidden_size, (args.batch, args.length)
    ids, ones = torch.randint(0, 40_000, size), torch.ones(size, dtype=torch.long)
    batch = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
    batch |= {"advantages": torch.linspace(-1, 1, args.batch), "num_items_in_batch": torch.tensor(float(ids.numel()))}
    batch |= {"thinking_states": torch.randn(*size, width), "thinking_mask": ones.bool()}
    on = {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}
    _, peak = measured(lambda: trainer.compute_loss(trainer.model, on).backward())
    trainer.model.zero_grad(set_to_none=True)
    return peak


def main(flags: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name", default="smollm2-135m", help="hub id, folder, or smollm2-135m")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--batch", type=int, default=8, help="completions in a step")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--vocabulary", action="store_true", help="measure the loss's memory by vocabulary")
    parser.add_argument("--out", type=Path, default=None, help="also write the numbers to this JSON file")
    args = parser.parse_args(flags)
    if args.vocabulary:
        rounds = vocabularies(args)
        for size in VOCABULARIES:
            peaks, grown = zip(*((row[size], row[size] / row[VOCABULARIES[0]]) for row in rounds), strict=True)
            print(
                f"{size} tokens: {statistics.median(peaks):.3f} GiB ({min(peaks):.3f} to {max(peaks):.3f}), "
                f"{statistics.median(grown):.3f} ({min(grown):.3f} to {max(grown):.3f}) times the first"
            )
    else:
        rounds = steps(args)
        show(rounds)
    if args.out:
        record = {
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": device_name(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record | {"options": vars(args) | {"out": None}}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
