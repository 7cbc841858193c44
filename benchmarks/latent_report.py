"""The results of latent.py and latent_grpo.py as tables in Markdown, on standard output, and a picture."""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

ROUND = 3
LENGTHS = ("8", "16", "20", "23", "24")


def rows_of(path: Path, **wanted: object) -> list[dict]:
    """The lines of a file of results whose values or options are the wanted ones."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if all((row | row["options"]).get(key) == value for key, value in wanted.items())]


def grouped(rows: list[dict], key: str) -> dict[str, list[dict]]:
    """Rows by a value, in the order in which it first appears."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def mean_and_each(values: list[float]) -> str:
    """The mean, and each value in the order of the seeds."""
    each = ", ".join(f"{value:.{ROUND}f}" for value in values)
    return f"**{statistics.mean(values):.{ROUND}f}** ({each})" if values else ""


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def main_table(rows: list[dict]) -> str:
    """Accuracies by arm, and what an arm took."""
    lines = []
    for arm, group in grouped(rows, "arm").items():
        start = [row["begun"]["16"] for row in group]
        taught = [row["taught"]["16"] for row in group if row["taught"]]
        minutes = statistics.mean(row["seconds"] for row in group) / 60
        tested = [mean_and_each([row["accuracy"][h] for row in group]) for h in LENGTHS]
        lines.append([f"`{arm}`", mean_and_each(start), mean_and_each(taught), *tested, f"{minutes:.0f}"])
    return table(["arm", "16, start", "16, taught", *LENGTHS, "minutes"], lines)


def control_table(rows: list[dict]) -> str:
    """Accuracies at h = 16 with other residuals in the thoughts' place."""
    rows = [row for row in rows if row.get("controls")]
    names = list(rows[0]["controls"]) if rows else []
    lines = []
    for arm, group in grouped(rows, "arm").items():
        means = [statistics.mean(row["controls"][name] for row in group) for name in names]
        lines.append([f"`{arm}`", *(f"{value:.{ROUND}f}" for value in means)])
    return table(["arm", *names], lines)


def grpo_table(rows: list[dict]) -> str:
    """Accuracies before and after GRPO, and its reward."""
    lines = []
    for bptt, group in grouped(rows, "bptt").items():
        lengths = list(group[0]["before"])
        before = [statistics.mean(row["before"][h] for row in group) for h in lengths]
        after = [mean_and_each([row["after"][h] for row in group]) for h in lengths]
        change = [f"{was:.{ROUND}f} to {now}" for was, now in zip(before, after, strict=True)]
        lines.append([str(bptt), *change])
    return table(["bptt", *(f"h = {h}" for h in lengths)], lines) if rows else ""


def draw(rows: list[dict], grpo: list[dict], path: Path) -> None:
    """Learning curves of the arms at h = 16, a line a seed, and the reward of GRPO."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (arm, group) in enumerate(grouped([row for row in rows if row["curve"]], "arm").items()):
        for i, row in enumerate(group):
            for phase, style in (("taught", ":"), ("product", "-")):
                points = [point for point in row["curve"] if point["phase"] == phase]
                label = arm if i == 0 and style == "-" else None
                values = [point["16"] for point in points]
                left.plot([p["step"] for p in points], values, f"C{color}{style}", label=label, alpha=0.7)
    left.set(xlabel="step", ylabel="products of 16 elements right", ylim=(-0.02, 1.02))
    left.set_title("dotted: thinking is taught; solid: the product is the only loss", fontsize=9)
    left.legend(fontsize=8)
    for color, (bptt, group) in enumerate(grouped(grpo, "bptt").items()):
        for i, row in enumerate(group):
            rewards = [point["reward"] for point in row["log"]]
            smooth = [statistics.mean(rewards[max(0, j - 9) : j + 1]) for j in range(len(rewards))]
            right.plot(smooth, f"C{color}", label=f"GRPO, bptt = {bptt}" if i == 0 else None, alpha=0.7)
    right.set(xlabel="step of GRPO", ylabel="mean reward (of 10 steps)", ylim=(-0.02, 1.02))
    if grpo:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(flags: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    results = Path("benchmarks/results")
    parser.add_argument("--results", type=Path, default=results / "latent.jsonl", help="of latent.py")
    parser.add_argument("--grpo", type=Path, default=results / "latent-grpo.jsonl", help="of latent_grpo.py")
    parser.add_argument("--task", default="a5", help="a5 or sum")
    parser.add_argument("--curriculum", default="replace", help="replace or readout")
    parser.add_argument("--r_max", type=float, default=0.1, help="upper end of λ's start")
    parser.add_argument("--png", type=Path, default=None, help="where the picture goes")
    args = parser.parse_args(flags)
    rows = rows_of(args.results, task=args.task, curriculum=args.curriculum, r_max=args.r_max)
    rows.sort(key=lambda row: row["seed"])
    grpo = rows_of(args.grpo, task=args.task)
    for part in (main_table(rows), control_table(rows), grpo_table(grpo)):
        print(part)
    if args.png:
        draw(rows, grpo, args.png)


if __name__ == "__main__":
    main()
