"""Tokens a second of stock `generate` against thinking with either residual, alternating in one process.

Each round times all three kinds on the same prompts, so that a noisy machine slows them alike; the ratios are taken
within a round, and their median is reported. The kinds change places from round to round.
"""

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from measuring import device, device_name, timed
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hrpo_patches.models.backends import start_backend
from hrpo_thinking.errors import InputError, PatchError

KINDS = ("stock", "projection", "embedding")


def tokens_a_second(model, tokenizer, inputs, kind, length):
    """Time one greedy `generate` of exactly `length` tokens a sequence."""
    options = {}
    if kind != "stock":
        model.config.thinking["residual"] = kind
        options = {"thinking": True, "tokenizer": tokenizer}
    exactly = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
    seconds = timed(lambda: model.generate(**inputs, **exactly, **options))
    return len(inputs["input_ids"]) * length / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", default="transformers", help="auto, transformers or unsloth")
    parser.add_argument("--model_name", default="smollm2-135m", help="hub id, folder, or smollm2-135m")
    parser.add_argument("--batch", type=int, default=8, help="sequences decoded at once")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a sequence")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, each with all three kinds")
    parser.add_argument("--out", type=Path, default=None, help="also write the numbers to this JSON file")
    args = parser.parse_args()
    try:
        backend = start_backend(args.backend)
        from hrpo_patches.models.base import load_model
        from hrpo_thinking.config import ThinkingConfig  # transformers comes after unsloth

        model, tokenizer = load_model(args.model_name, ThinkingConfig(), backend=backend)
    except (InputError, PatchError) as error:
        parser.error(str(error))
    model = model.eval().to(device())
    prompts = [f"Tell me a story of {n} animals and what they learned." for n in range(2, 2 + args.batch)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    for kind in KINDS:  # warm up, and make the marker's table, which is kept
        tokens_a_second(model, tokenizer, inputs, kind, 4)
    rounds = []
    for n in track(range(args.rounds), description="Decoding"):
        order = KINDS[n % 3 :] + KINDS[: n % 3]
        rounds.append({kind: tokens_a_second(model, tokenizer, inputs, kind, args.tokens) for kind in order})
    table = Table(
        title=f"{args.model_name}, {backend}, batch {args.batch}, {args.tokens} tokens, {args.rounds} rounds"
    )
    for column in ("generate", "tokens/s (median)", "of stock (median)", "of stock (range)"):
        table.add_column(column)
    record = {"rounds": rounds, "ratios": {}}
    for kind in KINDS:
        ratios = [row[kind] / row["stock"] for row in rounds]
        record["ratios"][kind] = statistics.median(ratios)
        speed = statistics.median(row[kind] for row in rounds)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(kind, f"{speed:.1f}", f"{statistics.median(ratios):.3f}", spread)
    Console().print(table)
    if args.out:
        versions = {"torch": torch.__version__, backend: version(backend), "device": device_name()}
        record |= {"environment": versions | {"threads": torch.get_num_threads()}, "title": table.title}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
