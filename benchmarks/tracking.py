"""Do thoughts carry anything on language? Five people pass things on, and one thought replaces a whole sentence.

A problem is `passing`'s: a line of English per move, then a question; the moves generate A5, so that no fixed number
of layers follows long chains. A written step is a sentence ("Bob has the ball after move 3.", ten or eleven tokens),
and `hrpo sft` replaces it by one thought. It begins with the name, so that the state before a step knows it already,
and least squares has something to start from. The model is SmolLM2-135M, pretrained and whole. All arms of a seed
start from one model, which writes all steps:

    exact       thoughts, the exact gradient through them
    published   thoughts, their states as constants (--bptt 0)
    fillers     forced tokens in the same places, under the same curriculum, with which nothing is blended
    embedding   the original HRPO's residual, the exact gradient
    fit         thoughts as least squares starts them, at the last stage, without training
    written     the start itself, which writes the steps

The verdict, written before the first run. Thoughts carry the moves on language if, at the most moves that were trained
(16 for the claim; fewer is a pilot and says nothing about depth), in each of three seeds:

    exact - fillers >= 0.30
    swapped thoughts give the partner's answer for at least half of the problems
    exact, thoughts zeroed <= 0.30 (chance is 0.20)

The gradient through the thoughts is needed for it if exact - published >= 0.10 in each seed.

    python benchmarks/tracking.py OUT --seeds 0 1 2                  # the claim: days on two cores
    python benchmarks/tracking.py OUT --moves 6 --start_steps 100 80 130 150 --steps 320 --arms exact fillers

Each part is a folder under OUT, and what is complete there is not run again; an interrupted part is resumed. The
table goes to OUT/tracking.md, and its numbers to OUT/tracking.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer

import hrpo_patches  # noqa: F401  before transformers
from hrpo_patches.models.base import load_model
from hrpo_patches.tasks.passing import passing
from hrpo_patches.tasks.prompts import prompt_of

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
TOKENS_A_STEP = 11


def hrpo(*words: object) -> None:
    """Run one command of the project, and stop if it fails."""
    print("hrpo", *words, flush=True)
    subprocess.run([sys.executable, "-m", "hrpo_patches", *map(str, words)], check=True)


def task_of(moves: object) -> str:
    """Problems of so many moves, which all ask about the first thing."""
    return f"passing?moves={moves}&asked=0"


def base_of(out: Path, layers: int) -> Path:
    """The pretrained model's first layers, with the tokens that the task's texts consist of, as a folder."""
    folder = out / f"base-{layers}"
    if not (folder / "model.safetensors").is_file():
        model, tokenizer = load_model("smollm2-135m", None, dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
        tokenizer = with_fewer_tokens(model, tokenizer, texts())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def texts() -> list[str]:
    """Texts with every word of the task."""
    found = []
    for names, things, phrasing in ((0, 0, 0), (1, 1, 1)):
        task = passing(f"passing?moves=30&names={names}&things={things}&phrasing={phrasing}", 100, 0)
        for row in task.generated(""):
            found += [prompt_of(task, row["question"], "####", [], False), f"#### {row['answer'][0]}"]
            found += [step + "\n" for step in row["steps"]]
    return found


def with_fewer_tokens(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Take from a model the tokens that these texts do not contain; its tokenizer without them.

    Nothing else of the model changes: these texts have the same tokens, and their logits are the same numbers. Of
    SmolLM2's 49,152 tokens some 500 are left, and neither the LM head nor its optimizer takes time any more.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = spec["model"]["vocab"], [tuple(pair) for pair in spec["model"]["merges"]]
    name_of = {number: name for name, number in vocabulary.items()}
    before = tokenizer(texts)["input_ids"]
    wanted = [name_of[number] for row in before for number in row]
    kept = {name for name in vocabulary if len(name) == 1} | {token["content"] for token in spec["added_tokens"]}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        pairs.setdefault(left + right, []).append((left, right))
    while wanted:  # a token, and the tokens that it is merged from
        name = wanted.pop()
        if name not in kept:
            kept.add(name)
            wanted += [part for pair in pairs.get(name, ()) for part in pair]
    numbers = sorted(vocabulary[name] for name in kept)  # special tokens come first, and keep their numbers
    spec["model"]["vocab"] = {name_of[number]: new for new, number in enumerate(numbers)}
    spec["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= kept]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    if [[numbers[new] for new in row] for row in tokenizer(texts)["input_ids"]] != before:
        raise RuntimeError("the texts have other tokens now")
    embeddings = model.get_input_embeddings().weight.data[numbers].clone()
    model.resize_token_embeddings(len(numbers))
    model.get_input_embeddings().weight.data.copy_(embeddings)
    return tokenizer


def sft(folder: Path, model: Path, task: str, args: argparse.Namespace, seed: int, *words: object) -> Path:
    """One supervised run, unless it is complete; resumed where it was interrupted."""
    if (folder / "report.json").is_file():
        return folder
    resumed = ("--resume_from_checkpoint", "latest") if any(folder.glob("checkpoint-*")) else ()
    hrpo(
        "sft", "--model_name", model, "--task", task, "--limit", args.problems, "--prompt", "plain", "--seed", seed,
        "--output_dir", folder, "--lora_rank", 0, "--bf16", "true", "--per_device_train_batch_size", args.batch,
        "--max_completion_length", TOKENS_A_STEP * args.moves + 10, "--adam_beta2", 0.98, "--save_steps", 50,
        "--save_total_limit", 1, "--report", "false", "--logging_steps", 10, *words, *resumed,
    )  # fmt: skip
    return folder


def start(out: Path, args: argparse.Namespace, seed: int) -> Path:
    """A model that writes all steps: problems of two moves first, then of twice as many, and so on."""
    model, most = base_of(out, args.layers), 2
    for number, steps in enumerate(args.start_steps):
        folder, task = out / f"{seed}-start-{number}", task_of(f"1-{most}")
        words = ("--until", 0, "--lr", args.start_lr, "--residual", "none", "--max_steps", steps)
        model = sft(folder, model, task, args, seed, *words)
        most = min(2 * most, args.moves)
    return model


def check_start(out: Path, args: argparse.Namespace, seed: int) -> None:
    """Stop unless the start writes its steps right: no arm can learn from a start that guesses them."""
    (scores,) = scores_of(evaluated(out, args, seed, "written", args.moves))
    if scores["mean"] < args.start_accuracy:
        raise SystemExit(
            f"seed {seed}: the start answers {scores['mean']:.2f} of problems with {args.moves} moves right when it "
            f"writes the steps; expected {args.start_accuracy}. Raise --start_steps, and remove {out}/{seed}-*."
        )


def trained(out: Path, args: argparse.Namespace, seed: int, arm: str) -> Path:
    """The model of one arm."""
    model = start(out, args, seed)
    if arm == "written":
        return model
    words = (
        "--until", args.moves, "--lr", args.lr, "--max_steps", args.steps, "--advance", args.advance,
        "--advance_loss", args.advance_loss, "--advance_batches", 15, "--thoughts_per_step", args.thoughts_per_step,
        *FLAGS[arm],
    )  # fmt: skip
    return sft(out / f"{seed}-{arm}", model, task_of(f"1-{args.moves}"), args, seed, *words)


def evaluated(out: Path, args: argparse.Namespace, seed: int, arm: str, moves: int) -> dict:
    """The read-outs of one arm at so many moves."""
    model, file = trained(out, args, seed, arm), out / f"{seed}-{arm}-{moves}.json"
    if not file.is_file():
        thinks = arm not in ("fillers", "written")
        forced = 0 if arm == "written" else args.thoughts_per_step * max(moves, args.moves)
        words = ("--control", "all") if thinks else ("--no-thinking",)
        room = forced + 10 + (TOKENS_A_STEP * moves if arm == "written" else 0)
        hrpo(
            "eval", "--model", model, "--task", task_of(moves), "--limit", args.tested, "--prompt", "plain",
            "--thoughts", forced, "--max_new_tokens", room, "--batch_size", 50, "--out", file, *words,
        )  # fmt: skip
    return json.loads(file.read_text())


def scores_of(results: dict) -> list[dict]:
    """The scores of an evaluation, one per control."""
    return [one["scores"] for one in results.get("variations", [results])]


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


def draw(out: Path, seeds: list[int], arms: list[str], png: Path) -> None:
    """Draw the steps that are thoughts, and the loss, over the optimizer's steps: a line per arm and seed."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for seed in seeds:
        for number, arm in enumerate(arm for arm in arms if arm not in ("written", "fit")):
            log = json.loads((out / f"{seed}-{arm}" / "report.json").read_text())["log"]
            rows = [row for row in log if "loss" in row]
            style = {"color": f"C{number}", "label": arm if seed == seeds[0] else None}
            left.plot([row["step"] for row in rows], [row["stage"] for row in rows], **style)
            right.plot([row["step"] for row in rows], [row["loss"] for row in rows], **style)
    left.set(xlabel="optimizer step", ylabel="sentences replaced by thoughts")
    right.set(xlabel="optimizer step", ylabel="loss, nats per token", yscale="log")
    left.legend()
    plt.savefig(png, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--layers", type=int, default=30, help="the first of SmolLM2's; fewer learn little (default: 30)"
    )
    parser.add_argument("--moves", type=int, default=16, help="the most in training (default: 16)")
    parser.add_argument("--test", nargs="+", type=int, help="moves that are tested (default: a quarter, half, all)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--problems", type=int, default=20_000)
    parser.add_argument("--tested", type=int, default=200, help="problems of each read-out (default: 200)")
    parser.add_argument("--start_steps", nargs="+", type=int, default=[200, 200, 300, 600])
    parser.add_argument(
        "--start_accuracy", type=float, default=0.9, help="that the start must reach by writing (default: 0.9)"
    )
    parser.add_argument("--start_lr", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=2000, help="of an arm (default: 2000)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument(
        "--thoughts_per_step", type=int, default=1, help="thoughts in the place of a sentence (default: 1)"
    )
    parser.add_argument("--advance", default="loss", help="when the next sentence is replaced (default: loss)")
    parser.add_argument("--advance_loss", type=float, default=0.06, help="a guess is 0.15 (default: 0.06)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tests = args.test or sorted({max(1, args.moves // 4), max(1, args.moves // 2), args.moves})
    for seed in args.seeds:
        check_start(args.out, args, seed)
    found = {
        f"{seed} {arm} {moves}": evaluated(args.out, args, seed, arm, moves)
        for seed in args.seeds
        for arm in args.arms
        for moves in tests
    }
    kept = {name: scores_of(results) for name, results in found.items()}
    (args.out / "tracking.json").write_text(json.dumps(kept, indent=1) + "\n")
    (args.out / "tracking.md").write_text(table_of(found))
    draw(args.out, args.seeds, args.arms, args.out / "tracking.png")
    print(table_of(found))


if __name__ == "__main__":
    main()
