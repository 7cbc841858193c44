"""Draws a finished run; knows its log, nothing of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PANELS = {
    "reward": ("Mean reward", "share of completions that are right"),
    "marker_rate": ("Marker rate", "share of completions with the marker"),
    "embeds_ratio": ("Share a of the embedding", "mean a over thinking positions"),
    "projection/weight_norm": ("Size of the projection", "Frobenius norm of W"),
}

_FLAT = 1e-3  # a smaller change is drawn as a flat line


def series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric in a trainer's `log_history`."""
    rows = [row for row in log if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def write_json(record: dict[str, Any], folder: Path) -> Path:
    """Write `report.json` into `folder`."""
    path = folder / "report.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def draw(record: dict[str, Any], folder: Path) -> Path:
    """Draw reward, marker rate, a and projection norm over the steps into `folder/report.png`.

    Args:
        record: what `report.json` holds: "title", "log", and "before" and "after" if the run was evaluated.
        folder: where the picture goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (key, (title, label)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        steps, values = series(record["log"], key)
        axes.set(title=title, xlabel="optimizer step", ylabel=label)
        if not values:
            axes.text(0.5, 0.5, "not part of this run", ha="center", va="center", transform=axes.transAxes)
            continue
        axes.plot(steps, values, color="tab:blue", alpha=0.35, label="each step")
        window = max(1, len(values) // 8)
        means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
        axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of {window} steps")
        axes.ticklabel_format(useOffset=False)
        if max(values) - min(values) < _FLAT:  # or rounding noise would look like a trend
            axes.set_ylim(values[0] - _FLAT, values[0] + _FLAT)
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    figure.suptitle(_headline(record))
    path = folder / "report.png"
    figure.savefig(path, dpi=120)
    return path


def _headline(record: dict[str, Any]) -> str:
    if "after" not in record:
        return record["title"]
    before, after = record["before"], record["after"]
    return (
        f"{record['title']}\ngreedy accuracy on {after['total']} held-out problems: "
        f"{before['mean']:.3f} ± {before['standard_error']:.3f} before, "
        f"{after['mean']:.3f} ± {after['standard_error']:.3f} after"
    )
