"""Trains each residual from the same seeds, data and budget, evaluates each with thinking on and off, and compares.

Every run and every evaluation is kept in --runs and is not done again, so that it can be stopped and started: a run
resumes from its newest checkpoint, or starts again without one. What it evaluates on is drawn from the
configuration's generator with a seed of its own, the same problems for all.

The standard errors are over seeds. The p are over problems: each problem's verdicts are averaged over the seeds, and
the signs of the differences are flipped at random. So a p speaks of these trained models, not of the next seed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev

import yaml
from rich.console import Console

import hrpo_patches  # noqa: F401 - before transformers
from hrpo_patches.monitor.report import Run, draw, read_run

ROOT = Path(__file__).parents[1]
RESIDUALS = ("projection", "embedding", "none")


def call(*command):
    """Run a command of the project in its root; its output goes to the terminal."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def train(args, residual, seed):
    """The folder of a finished run."""
    folder = args.runs / f"{residual}-{seed}"
    if not (folder / "report.json").is_file():
        resume = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # ours, and stopped before there was anything to keep
        flags = ["--residual", residual, "--seed", seed, "--output_dir", folder, *resume]
        call(f"scripts/hrpo_{args.script}.py", "--config", args.config, *flags)
    return folder


def evaluate(args, folder, thinking):
    """The results of a run's adapter: for each problem whether it was answered right, and the mean length."""
    out = args.runs / f"{folder.name}.{'thinking' if thinking else 'hard'}.{args.limit}-{args.eval_seed}.json"
    if not out.is_file():
        settings = yaml.safe_load(args.config.read_text())
        taken = ("dataset", "prompt", "answer_start", "task", "shots")
        flags = [text for name in taken if name in settings for text in (f"--{name}", settings[name])]
        flags += ["--examples", *settings["examples"]] if settings.get("examples") else []
        flags += [
            "--max_new_tokens",
            settings["max_completion_length"],
            "--limit",
            args.limit,
            "--seed",
            args.eval_seed,
        ]
        flags += ["--thinking" if thinking else "--no-thinking", "--batch_size", args.batch_size]
        call("-m", "hrpo_patches", "eval", "--adapter", folder, "--out", out, *flags)
    results = json.loads(out.read_text())
    right = [problem["samples"][0]["right"] for problem in results["problems"]]
    return {"right": right, "tokens": results["scores"]["mean_tokens"]}


def averaged(residual, runs):
    """One run that is the mean of several, step by step."""
    by_step = {}
    for row in (row for run in runs for row in run.rows if "loss" in row):
        by_step.setdefault(row["step"], []).append(row)
    rows = []
    for step, found in sorted(by_step.items()):
        numbers = {key for row in found for key, value in row.items() if isinstance(value, (int, float))}
        shared = [key for key in numbers if all(isinstance(row.get(key), (int, float)) for row in found)]
        rows.append({key: mean(row[key] for row in found) for key in shared} | {"step": step})
    return Run(f"mean of {len(runs)} seeds", residual, rows, {})


def standard_error(shares):
    """Of the mean over seeds; None for a single seed."""
    return stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None


def compare_pair(one, other):
    """Difference of two conditions' accuracies and its p: signs of the problems' differences flipped at random."""
    from scipy.stats import permutation_test

    gaps = [mean(a) - mean(b) for a, b in zip(zip(*one, strict=True), zip(*other, strict=True), strict=True)]
    zeros = [0.0] * len(gaps)
    found = permutation_test(
        (gaps, zeros), lambda a, b: mean(a) - mean(b), permutation_type="samples", n_resamples=9999, rng=0
    )
    return {"difference": mean(gaps), "p": float(found.pvalue)}


def markdown(record):
    """The tables of a comparison."""
    lines = ["| residual | read out | accuracy of each seed | mean | standard error | tokens | seconds a step |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in record["conditions"]:
        shares = ", ".join(f"{share:.3f}" for share in row["shares"])
        error = "none" if row["standard_error"] is None else f"{row['standard_error']:.3f}"
        cells = [row["residual"], row["read_out"], shares, f"{row['mean']:.3f}", error]
        cells += [f"{row['tokens']:.1f}", f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| one | other | difference | p |", "|---|---|---|---|"]
    for pair in record["pairs"]:
        lines.append(f"| {pair['one']} | {pair['other']} | {pair['difference']:+.3f} | {pair['p']:.3f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", help="of the training")
    parser.add_argument("--script", default="gsm8k", help="scripts/hrpo_SCRIPT.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one run of each residual for each")
    parser.add_argument("--residuals", nargs="+", choices=RESIDUALS, default=RESIDUALS, help="what is compared")
    parser.add_argument("--limit", type=int, default=400, help="problems that each is evaluated on")
    parser.add_argument("--eval_seed", type=int, default=1000, help="of the generator of these problems")
    parser.add_argument("--batch_size", type=int, default=50, help="of the evaluation")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare", help="where runs and results are kept")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md and OUT.png; must not exist")
    args = parser.parse_args()
    args.runs, args.config = args.runs.absolute(), args.config.absolute()
    files = [args.out.with_name(args.out.name + ending) for ending in (".json", ".md", ".png")]
    if taken := [file for file in files if file.exists()]:
        parser.error(f"{taken[0]} exists already; give another --out.")
    args.runs.mkdir(parents=True, exist_ok=True)
    kept = args.runs / "config.yaml"
    if kept.exists() and kept.read_bytes() != args.config.read_bytes():
        parser.error(f"{args.runs} holds runs of another configuration, {kept}; give other --runs.")
    shutil.copyfile(args.config, kept)
    folders = {residual: [] for residual in args.residuals}
    for seed in args.seeds:  # one seed of each before the next, so that a part is a comparison too
        for residual in args.residuals:
            folders[residual].append(train(args, residual, seed))
    conditions, verdicts = [], {}
    for residual, found in folders.items():
        seconds = median(value for folder in found for value in read_run(folder).series("step_time")[1])
        for thinking in (True, False) if residual != "none" else (False,):
            results = [evaluate(args, folder, thinking) for folder in found]
            name = "thinking" if thinking else "hard"
            shares = [mean(result["right"]) for result in results]
            verdicts[f"{residual}, {name}"] = [result["right"] for result in results]
            row = {"residual": residual, "read_out": name, "shares": shares, "mean": mean(shares), "seconds": seconds}
            tokens = mean(result["tokens"] for result in results)
            conditions.append(row | {"standard_error": standard_error(shares), "tokens": tokens})
    pairs = [
        {"one": one, "other": other} | compare_pair(verdicts[one], verdicts[other])
        for one, other in combinations(verdicts, 2)
    ]
    settings = {"seeds": args.seeds, "problems": args.limit, "config": args.config.name, "eval_seed": args.eval_seed}
    record = settings | {"conditions": conditions, "pairs": pairs}
    files[0].write_text(json.dumps(record, indent=1) + "\n")
    files[1].write_text(markdown(record))
    draw([averaged(residual, [read_run(folder) for folder in found]) for residual, found in folders.items()], files[2])
    Console().print(markdown(record), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
