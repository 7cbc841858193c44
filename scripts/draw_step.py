"""Draws docs/step.svg, the picture of the README: what a plain step and a thinking step put into a model."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PAPER, INK, GREY, TOKEN, THOUGHT = "#ffffff", "#1f2328", "#d8dee4", "#0969da", "#bc4c00"  # readable on dark pages, too
MIDDLE = {"ha": "center", "va": "center"}


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = INK, fill: str = PAPER) -> None:
    """A box of height 0.62 around (x, y)."""
    shape = FancyBboxPatch((x - width / 2, y - 0.31), width, 0.62, boxstyle="round,pad=0.02,rounding_size=0.1")
    shape.set(edgecolor=colour, facecolor=fill, linewidth=1.4)
    axes.add_patch(shape)
    axes.text(x, y, text, color=INK, fontsize=11, linespacing=1.25, **MIDDLE)


def arrow(axes: Axes, points: list[tuple[float, float]], text: str = "", colour: str = INK) -> None:
    """A line through `points` that ends in an arrow head, with `text` above its last piece."""
    for start, end in pairwise(points):
        last = end == points[-1]
        style = {"arrowstyle": "-|>" if last else "-", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, start, arrowprops=style)
    (x, y), (x_end, y_end) = points[-2:]
    axes.text((x + x_end) / 2, (y + y_end) / 2 + 0.2, text, color=colour, fontsize=12, **MIDDLE)


def step(axes: Axes, y: float, title: str, thinking: bool) -> None:
    """One step, from the model to its next input, on the line `y`."""
    axes.text(0.1, y + (1.55 if thinking else 0.75), title, color=INK, fontsize=12.5, weight="bold", va="center")
    end = 11.35
    box(axes, 0.95, y, 1.5, "model,\nstep t - 1", fill=GREY)
    arrow(axes, [(1.72, y), (2.55, y)])
    axes.text(2.1, y - 0.22 if thinking else y + 0.22, r"$h_{t-1}$", color=INK, fontsize=12, **MIDDLE)
    box(axes, 3.2, y, 1.25, "head,\nsample", TOKEN)
    arrow(axes, [(3.85, y), (4.75, y)], r"token $x_t$", TOKEN)
    box(axes, 5.45, y, 1.35, "embedding\ntable", TOKEN)
    if thinking:
        top = y + 1.0
        arrow(axes, [(2.1, y), (2.1, top), (4.35, top)], colour=THOUGHT)
        box(axes, 5.45, top, 2.15, r"$W\,h$, normalised", THOUGHT)
        arrow(axes, [(6.55, top), (7.3, top)], r"$s_t$", THOUGHT)
        box(axes, 8.2, top, 1.75, r"$\times\; i\,\sqrt{1-a^2}$", THOUGHT)
        arrow(axes, [(9.1, top), (9.75, top), (9.75, y + 0.2)], colour=THOUGHT)
        arrow(axes, [(6.15, y), (7.3, y)], r"$e_t$", TOKEN)
        box(axes, 8.2, y, 1.75, r"$\times\; a$", TOKEN)
        arrow(axes, [(9.1, y), (9.57, y)], colour=TOKEN)
        axes.text(
            10.0,
            top,
            r"$W$, $i$ and $a$ are learned;" + "\n" + r"$a\approx 0.995$ at the start",
            color=INK,
            fontsize=10,
            va="center",
        )
        axes.text(9.75, y, "+", color=INK, fontsize=14, **MIDDLE, bbox={"boxstyle": "circle,pad=0.18", "fc": PAPER})
        arrow(axes, [(9.95, y), (10.58, y)], r"$\hat{e}_t$")
    else:
        arrow(axes, [(6.15, y), (10.58, y)], r"$e_t$", TOKEN)
    box(axes, end, y, 1.5, "model,\nstep t", fill=GREY)


def draw(path: Path) -> None:
    """Draw both steps into `path`, an SVG or a PNG."""
    matplotlib.rcParams["svg.hashsalt"] = "step"  # the same file each time
    figure = Figure(figsize=(12.2, 4.3), facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 12.2), ylim=(0, 4.3))
    axes.axis("off")
    step(axes, 3.1, "Plain step (chain of thought): the next input is the token's embedding", thinking=False)
    step(axes, 0.65, "Thinking step: the next input also carries the last hidden state", thinking=True)
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "step.svg")
