"""Does reward teach thoughts further? GRPO on the product alone, from a model of latent.py's that was taught to think.

It begins with an --arm of latent.py after its curriculum, before the phase in which the product is the only
supervised loss. A few steps of its head alone, which no thought is made with, teach it the form of an answer: marker,
product, end. Then GRPO rewards right products of words of --length elements, with as many forced thoughts, and the
start as the KL reference. A line of --out is one run.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import hrpo_patches  # noqa: F401 - before transformers

# isort: split
import latent
import torch
from datasets import Dataset
from latent_words import ELEMENTS, END, EQUALS, SLOTS, TASKS, lesson, prefix_products, words_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hrpo_patches import HRPOConfig, HRPOTrainer
from hrpo_patches.commands.main import exit_status
from hrpo_patches.thinking.replay import replay_forward


def tokenizer_of() -> PreTrainedTokenizerFast:
    """Words for latent.py's tokens; the single bytes behind them are in no prompt, and the model cannot say them."""
    names = [f"e{i}" for i in range(ELEMENTS)] + ["_", ".", "=", "<end>", "<pad>"]
    names += [character for character in bytes_to_unicode().values() if character not in names]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[], ignore_merges=True))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", padding_side="left")


def teach_form(model, words: torch.Tensor, table: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step on marker, product and end after the thoughts; of the head alone, which no thought is made with."""
    tokens, _ = lesson(words, table, words.shape[1])
    tokens = torch.cat([tokens, torch.full((len(tokens), 1), END)], 1)
    width = tokens.shape[1] - 1 - SLOTS
    mask = (torch.arange(width) < words.shape[1]).expand(len(tokens), width)
    logits = replay_forward(model, tokens[:, :-1], thinking_mask=mask, logits_to_keep=3).logits
    optimizer.zero_grad()
    cross_entropy(logits.flatten(0, 1), tokens[:, -3:].flatten()).backward()
    optimizer.step()


def start_model(args: argparse.Namespace, seed: int):
    """The model that GRPO begins with."""
    options = latent.parsed(["--task", args.task, "--runs", str(args.runs), "--product", "0"])
    options.taught, options.written = args.taught, args.written
    model, _ = latent.trained(args.arm, options, seed)
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(args.form):
        words = words_of(64, latent.LONGEST - step % latent.LONGEST, False, generator)
        teach_form(model, words, TASKS[args.task](), optimizer)
    return model


def problems(n: int, args: argparse.Namespace, seed: int) -> Dataset:
    """Words of the asked length, none of which is tested, and their products."""
    words = words_of(n, args.length, False, torch.Generator().manual_seed(seed))
    products = prefix_products(words, TASKS[args.task]())[:, -1].tolist()
    prompts = [" ".join(f"e{i}" for i in word) + " _" * (SLOTS - args.length) for word in words.tolist()]
    return Dataset.from_dict({"prompt": prompts, "gold": [f"e{product}" for product in products]})


def right(completion_ids: list[list[int]], gold: list[str], **_: object) -> list[float]:
    """1 for exactly the marker, the product and the end."""
    return [float(ids == [EQUALS, int(answer[1:]), END]) for ids, answer in zip(completion_ids, gold, strict=True)]


def accuracies(model, args: argparse.Namespace) -> dict[str, float]:
    """On words of the tested part."""
    arm, table = latent.ARMS[args.arm], TASKS[args.task]()
    lengths = sorted({*latent.TESTED, args.length})
    return {str(h): latent.accuracy(model.eval(), arm, latent.tests(h, args.tests), table) for h in lengths}


def run(bptt: int | str, args: argparse.Namespace, seed: int) -> dict:
    """One GRPO run; its row of results."""
    model = start_model(args, seed)
    before = accuracies(model, args)
    with tempfile.TemporaryDirectory() as folder:
        config = HRPOConfig(
            output_dir=folder,
            answer_start="=",
            filler=".",
            thoughts=args.length,
            bptt=bptt,
            reference="start",
            beta=args.beta,
            learning_rate=args.lr,
            lr_residual_gate=args.lr,
            lr_residual_Lambda=args.lr,
            lr_thinking_projection=args.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            num_generations=8,
            per_device_train_batch_size=args.batch_size,
            max_completion_length=args.length + 4,
            max_steps=args.steps,
            logging_steps=1,
            temperature=1.0,
            loss_type="grpo",
            seed=seed,
            report_to="none",
            save_strategy="no",
            monitor=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
        )
        data = problems(args.steps * args.batch_size // 8, args, seed)
        trainer = HRPOTrainer(model, right, config, data, processing_class=tokenizer_of())
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    kept = ("step", "reward", "kl", "grad_norm", "bptt/terms", "bptt/gain", "bptt/remainder")
    log = [{key: row.get(key) for key in kept} for row in trainer.state.log_history if "kl" in row]
    row = {"bptt": bptt, "seed": seed, "options": options_of(args), "before": before, "seconds": seconds}
    return row | {"after": accuracies(trainer.model, args), "log": log}


def options_of(args: argparse.Namespace) -> dict:
    """What makes two runs the same one, beside bptt and seed."""
    return {k: v for k, v in vars(args).items() if k not in ("bptt", "seeds", "runs", "out", "tests")}


def main(flags: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--bptt", nargs="+", default=["0", "exact"], help="of the loss: what is compared")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of latent.py's models, and of GRPO")
    parser.add_argument("--arm", default="exact", choices=("exact", "all"), help="of latent.py, that GRPO begins with")
    parser.add_argument("--task", default="a5", choices=TASKS, help="the word problem of A5, or the control")
    parser.add_argument("--length", type=int, default=16, help="elements of a word, and thoughts")
    parser.add_argument("--written", type=int, default=2500, help="steps of latent.py's start, at most")
    parser.add_argument("--taught", type=int, default=800, help="steps of latent.py's curriculum, at most")
    parser.add_argument("--form", type=int, default=200, help="supervised steps on marker and end")
    parser.add_argument("--steps", type=int, default=300, help="of GRPO")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of all weights")
    parser.add_argument("--beta", type=float, default=0.01, help="weight of the KL divergence from the start")
    parser.add_argument("--batch_size", type=int, default=128, help="completions in a step, 8 of a word")
    parser.add_argument("--tests", type=int, default=1000, help="words of each length in the tests")
    parser.add_argument("--runs", type=Path, default=Path("runs/latent"), help="where latent.py keeps weights")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latent-grpo.jsonl"), help="a line a run")
    args = parser.parse_args(flags)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    keys = [(str(row["bptt"]), row["seed"], row["options"]) for row in done]
    for seed in args.seeds:
        for bptt in args.bptt:
            if (bptt, seed, options_of(args)) in keys:
                print(f"{bptt}, seed {seed}: done already")
                continue
            row = run(bptt, args, seed)
            print({k: row[k] for k in ("bptt", "seed", "before", "after", "seconds")}, flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
