"""Do thoughts carry anything on language? Five people pass things on, and one thought replaces a whole sentence.

A problem is `passing`'s: a line of English per move, then a question; the moves generate A5, so that no fixed number
of layers follows long chains. A written step is a sentence ("After move 3, Bob has the ball.", eight or nine tokens),
and `hrpo sft` replaces it by one thought. All arms of a seed go on from one model, which writes all steps:

    exact       thoughts, the exact gradient through them
    published   thoughts, their states as constants (--bptt 0)
    fillers     forced tokens in the same places, under the same curriculum, with which nothing is blended
    embedding   the original HRPO's residual, the exact gradient
    fit         thoughts as least squares starts them, at the last stage, without training
    written     the start itself, which writes the steps

The verdict, written before the first run. Thoughts carry the moves on language if, at the most moves that were trained
(16 for the claim; fewer is a pilot and says nothing about depth), in each of three seeds:

    exact - fillers >= 0.30, also for fillers with twice the layers (--layers)
    swapped thoughts give the partner's answer for at least half of the problems
    exact, thoughts zeroed <= 0.30 (chance is 0.20)

The gradient through the thoughts is needed for it if exact - published >= 0.10 in each seed.

    python benchmarks/tracking.py OUT --seeds 0 1 2                  # the claim: days on two cores
    python benchmarks/tracking.py OUT --moves 4 --start_steps 200 300 --steps 300 --arms exact fillers

Each part is a folder under OUT, and what is complete there is not run again; an interrupted part is resumed. The
table goes to OUT/tracking.md, and its numbers to OUT/tracking.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import hrpo_patches  # noqa: F401  before transformers
from hrpo_patches.models.base import load_model

ARMS = ("exact", "published", "fillers", "embedding", "fit", "written")
FLAGS = {
    "exact": ["--bptt", "exact"],
    "published": ["--bptt", "0"],
    "fillers": ["--residual", "none"],
    "embedding": ["--residual", "embedding"],
    "fit": ["--advance", "once", "--max_steps", "1"],  # and no rate, so that nothing moves
}
RATES = ("lr", "lr_thinking_projection", "lr_residual_gate", "lr_residual_Lambda")
FLAGS["fit"] += [word for name in RATES for word in (f"--{name}", "0")]
TOKENS_A_STEP = 10


def hrpo(*words: object) -> None:
    """Run one command of the project, and stop if it fails."""
    print("hrpo", *words, flush=True)
    subprocess.run([sys.executable, "-m", "hrpo_patches", *map(str, words)], check=True)


def task_of(moves: object) -> str:
    """Problems of so many moves, which all ask about the first thing."""
    return f"passing?moves={moves}&asked=0"


def base_of(out: Path, layers: int) -> Path:
    """The pretrained model's first layers, as a folder."""
    folder = out / f"base-{layers}"
    if not (folder / "model.safetensors").is_file():
        model, tokenizer = load_model("smollm2-135m", None, dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def sft(folder: Path, model: Path, task: str, args: argparse.Namespace, seed: int, *words: object) -> Path:
    """One supervised run, unless it is complete; resumed where it was interrupted."""
    if (folder / "report.json").is_file():
        return folder
    resumed = ("--resume_from_checkpoint", "latest") if any(folder.glob("checkpoint-*")) else ()
    hrpo(
        "sft", "--model_name", model, "--task", task, "--limit", args.problems, "--prompt", "plain", "--seed", seed,
        "--output_dir", folder, "--lora_rank", 0, "--bf16", "true", "--per_device_train_batch_size", args.batch,
        "--max_completion_length", TOKENS_A_STEP * args.moves + 10, "--adam_beta2", 0.98, "--save_steps", 100,
        "--save_total_limit", 1, "--report", "false", "--logging_steps", 10, *words, *resumed,
    )  # fmt: skip
    return folder


def start(out: Path, args: argparse.Namespace, seed: int) -> Path:
    """A model that writes all steps: problems of two moves first, then of twice as many, and so on."""
    model, most = base_of(out, args.layers), 2
    for steps in args.start_steps:
        folder, task = out / f"{seed}-start-{most}", task_of(f"1-{most}")
        words = ("--until", 0, "--lr", args.start_lr, "--residual", "none", "--max_steps", steps)
        model = sft(folder, model, task, args, seed, *words)
        most = min(2 * most, args.moves)
    return model


def trained(out: Path, args: argparse.Namespace, seed: int, arm: str) -> Path:
    """The model of one arm."""
    model = start(out, args, seed)
    if arm == "written":
        return model
    words = ("--until", args.moves, "--lr", args.lr, "--max_steps", args.steps)
    rule = ("--advance_loss", args.advance_loss, "--advance_batches", 15)
    return sft(out / f"{seed}-{arm}", model, task_of(f"1-{args.moves}"), args, seed, *words, *rule, *FLAGS[arm])


def evaluated(out: Path, args: argparse.Namespace, seed: int, arm: str, moves: int) -> dict:
    """The read-outs of one arm at so many moves."""
    model, file = trained(out, args, seed, arm), out / f"{seed}-{arm}-{moves}.json"
    if not file.is_file():
        thinks = arm not in ("fillers", "written")
        forced = 0 if arm == "written" else max(moves, args.moves)
        words = ("--control", "all") if thinks else ("--no-thinking",)
        room = forced + 10 + (TOKENS_A_STEP * moves if arm == "written" else 0)
        hrpo(
            "eval", "--model", model, "--task", task_of(moves), "--limit", args.tested, "--prompt", "plain",
            "--thoughts", forced, "--max_new_tokens", room, "--batch_size", 50, "--out", file, *words,
        )  # fmt: skip
    return json.loads(file.read_text())


def table_of(found: dict[str, dict]) -> str:
    """One line per arm and number of moves, one column per control."""
    columns = ("live", "zeroed", "swapped", "mean", "token", "off")
    lines = [
        "| seed, arm, moves | " + " | ".join(columns) + " | partner's answer | tokens |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, results in found.items():
        scores = {one["settings"]["control"]: one["scores"] for one in results.get("variations", [results])}
        cells = [f"{scores[column]['mean']:.3f}" if column in scores else "" for column in columns]
        partner = scores.get("swapped", {}).get("partner")
        cells += ["" if partner is None else f"{partner:.3f}", f"{scores['live']['mean_tokens']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--layers", type=int, default=6, help="of SmolLM2's 30, the first (default: 6)")
    parser.add_argument("--moves", type=int, default=16, help="the most in training (default: 16)")
    parser.add_argument("--test", nargs="+", type=int, help="moves that are tested (default: a quarter, half, all)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--problems", type=int, default=20_000)
    parser.add_argument("--tested", type=int, default=200, help="problems of each read-out (default: 200)")
    parser.add_argument("--start_steps", nargs="+", type=int, default=[300, 300, 400, 600])
    parser.add_argument("--start_lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=2000, help="of an arm (default: 2000)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--advance_loss", type=float, default=0.06, help="chance is 0.18 (default: 0.06)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tests = args.test or sorted({max(1, args.moves // 4), max(1, args.moves // 2), args.moves})
    found = {
        f"{seed} {arm} {moves}": evaluated(args.out, args, seed, arm, moves)
        for seed in args.seeds
        for arm in args.arms
        for moves in tests
    }
    kept = {name: [one["scores"] for one in results.get("variations", [results])] for name, results in found.items()}
    (args.out / "tracking.json").write_text(json.dumps(kept, indent=1) + "\n")
    (args.out / "tracking.md").write_text(table_of(found))
    print(table_of(found))


if __name__ == "__main__":
    main()
