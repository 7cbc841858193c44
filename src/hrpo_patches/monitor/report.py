"""Draws runs side by side and puts them into a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from hrpo_patches.extras import require_package
from hrpo_patches.files import missing, replace
from hrpo_patches.monitor.log import LOG_FILE, Row, read_rows
from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "reward": ("Reward", "mean reward over completions"),
    "marker_rate": ("Marker rate", "share of completions with the marker"),
    "loss": ("Loss", "of training"),
    "stage": ("Stage", "steps that are replaced by thoughts"),
    "eval_accuracy": ("Accuracy in training", "greedy, on held-out problems"),
    "eval_accuracy_off": ("The same, thoughts off", "greedy, on held-out problems"),
    "completions/mean_length": ("Completion length", "mean, in tokens"),
    "thinking/length": ("Thinking length", "mean, in tokens, without forced thoughts"),
    "a/mean": ("Share a of the token's embedding", "mean a over thinking positions"),
    "bptt/gain": ("Gradient through the thoughts", "norm, over the published gradient's"),
    "projection/drift": ("Drift of the projection", "‖W − W₀‖ / ‖W₀‖, W₀ at the start"),
    "cosine/embedding": ("Projected against embedding residual", "mean cosine, same decoding step"),
}
ACCURACY = "rewards/answer_is_right/mean"  # logged by runs whose reward is 1 for a right answer
_FLAT = 1e-3  # a smaller change is drawn as a flat line
_RAW = 0.3  # opacity of single steps


@dataclass
class Run:
    """What a run's folder holds.

    Attributes:
        name: what it is called here.
        residual: "projection", "embedding" or "none".
        rows: its log.
        record: `report.json`; empty for a run that has not finished.
    """

    name: str
    residual: str
    rows: list[Row]
    record: dict[str, Any]

    @property
    def label(self) -> str:
        """Name and residual."""
        return f"{self.name} ({self.residual})"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, where it was logged."""
        rows = [row for row in self.rows if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    @property
    def warnings(self) -> list[str]:
        """The early warnings of the run."""
        return [text for row in self.rows for text in [*row.get("warnings", []), *filter(None, [row.get("stopped")])]]

    @property
    def last_step(self) -> int:
        """The last step that the log knows of."""
        return max((row["step"] for row in self.rows), default=0)


def write_json(record: dict[str, Any], folder: Path) -> Path:
    """Write `report.json` into `folder`."""
    path = folder / "report.json"
    replace(path, json.dumps(record, indent=2) + "\n")
    return path


def read_run(folder: Path, name: str | None = None) -> Run:
    """The run in `folder`, also one that is still running or was killed.

    Raises:
        InputError: the folder holds no log, or a damaged one.
    """
    if absent := missing(str(folder)):
        raise InputError(f"the run {absent}")
    log, report = folder / LOG_FILE, folder / "report.json"
    if not log.is_file() and not report.is_file():
        raise InputError(f"{folder} is not the folder of a run: it holds neither {LOG_FILE} nor report.json.")
    rows = read_rows(log) if log.is_file() else []
    if log.is_file() and (not rows or "run" not in rows[0]):
        raise InputError(f"{log} does not begin with what the run is: the file is damaged.")
    try:
        record = json.loads(report.read_text()) if report.is_file() else {}
    except ValueError:
        raise InputError(f"{report} is no JSON: the file is damaged.") from None
    if not isinstance(record, dict):
        raise InputError(f"{report} holds no report: the file is damaged.")
    if not rows:  # a run with monitor=False
        header = {"run": {"residual": record.get("arguments", {}).get("residual", "projection")}}
        rows = [header, *record.get("log", [])]
    run = Run(name or folder.resolve().name, rows[0]["run"]["residual"], rows[1:], record)
    if run.last_step > max((row.get("step", 0) for row in record.get("log", [])), default=0):
        run.record.pop("after", None)  # the run has gone on since
    return run


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs, each under its folder's name, or under its path where names are the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names, strict=True)
    ]


def draw(runs: list[Run], path: Path) -> Path:
    """Draw reward, marker rate, length, a, drift and the like of the runs over their steps into a PNG at `path`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    chosen = {key: text for key, text in PANELS.items() if any(run.series(key)[1] for run in runs)} or PANELS
    rows = -(-len(chosen) // 4)
    figure = Figure(figsize=(16, 3.75 * rows), layout="constrained")
    panels = [*figure.subplots(rows, 4, squeeze=False).flat]
    for spare in panels[len(chosen) :]:
        spare.remove()
    for axes, (key, (title, label)) in zip(panels, chosen.items(), strict=False):
        if key == "reward" and all(map(_rewards_accuracy, runs)):
            label = "mean over completions; 1 is right"
        axes.set(title=title, xlabel="optimizer step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = [values for i, run in enumerate(runs) if (values := _draw_one(axes, run, key, f"C{i}"))]
        if not drawn:
            axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)
            continue
        low, high = min(map(min, drawn)), max(map(max, drawn))
        axes.ticklabel_format(useOffset=False)
        if high - low < _FLAT:  # or rounding noise would look like a trend
            axes.set_ylim(low - _FLAT, high + _FLAT)
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=f"C{i}", linewidth=2) for i in range(len(runs))]
    title = "faint: each log line; bold: mean of the last eighth of them"
    legend = figure.legend(handles, [run.label for run in runs], title=title, loc="outside lower center", ncols=3)
    for text in (figure.suptitle(_headline(runs)), *legend.get_texts()):
        text.set_parse_math(False)  # a name may hold dollars
    figure.savefig(path, dpi=110)
    return path


def _draw_one(axes: Axes, run: Run, key: str, color: str) -> list[float]:
    """One run's single steps, faint, and their running mean; returns the values."""
    steps, values = run.series(key)
    if values:
        window = max(1, len(values) // 8)
        means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
        dot = "o" if len(values) == 1 else None  # a line through one point is none
        axes.plot(steps, values, color=color, alpha=_RAW, marker=dot)
        axes.plot(steps, means, color=color, linewidth=2)
    return values


def _rewards_accuracy(run: Run) -> bool:
    """Whether a run's reward is the share of right answers: it has no other reward, such as that of the marker."""
    names = {name for row in run.rows for name in row if name.startswith("rewards/") and name.endswith("/mean")}
    return names == {ACCURACY}


def _headline(runs: list[Run]) -> str:
    if len(runs) > 1:
        parts = [run.record.get("title", "").split(", ") for run in runs]
        common = ", ".join(part for part in parts[0] if part and all(part in other for other in parts))
        return f"{common}: {len(runs)} runs side by side" if common else f"{len(runs)} runs side by side"
    (run,) = runs
    title = run.record.get("title", run.label)
    if not run.record.get("after") or not run.record.get("before"):
        return title
    before, after = (_accuracy(run, when) for when in ("before", "after"))
    total = run.record["after"]["total"]
    return f"{title}\ngreedy accuracy on {total} held-out problems: {before} before, {after} after"


def _accuracy(run: Run, when: str) -> str:
    score = run.record.get(when)
    return f"{score['mean']:.3f} ± {score['standard_error']:.3f}" if score else "–"


def _quarter(run: Run, key: str, last: bool = True, digits: int = 3) -> str:
    """The mean of a metric over the last, or the first, quarter of its log lines."""
    values = run.series(key)[1]
    size = max(1, len(values) // 4)
    chosen = values[-size:] if last else values[:size]
    return f"{sum(chosen) / len(chosen):.{digits}f}" if chosen else "–"


def _median(run: Run, key: str) -> str:
    values = run.series(key)[1]
    return f"{median(values):.1f}" if values else "–"


def table(runs: list[Run]) -> str:
    """The runs as a Markdown table, with the early warnings of each below it."""
    columns = {
        "run": lambda run: run.name,
        "residual": lambda run: run.residual,
        "steps": lambda run: str(run.last_step),
        "accuracy before": lambda run: _accuracy(run, "before"),
        "accuracy after": lambda run: _accuracy(run, "after"),
        "reward, first quarter": lambda run: _quarter(run, "reward", last=False),
        "reward, last quarter": lambda run: _quarter(run, "reward"),
        "marker rate, last quarter": lambda run: _quarter(run, "marker_rate"),
        "KL, last quarter": lambda run: _quarter(run, "kl", digits=4),
        "a, last quarter": lambda run: _quarter(run, "a/mean", digits=4),
        "drift of W, last quarter": lambda run: _quarter(run, "projection/drift"),
        "seconds a step, median": lambda run: _median(run, "step_time"),
    }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[value(run) for value in columns.values()] for run in runs]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    text += (
        "\nAccuracies are greedy, on held-out problems, ± the standard error; a, drift and KL are of the log lines.\n"
    )
    warned = [f"- **{run.name}**: {warning}\n" for run in runs for warning in run.warnings]
    return text + ("\nWarnings:\n\n" + "".join(warned) if warned else "")


def write_report(folders: list[Path], stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.md for the runs in these folders.

    Raises:
        InputError: a folder holds no run, one of the files exists, or matplotlib is not installed.
    """
    require_package("matplotlib", "report")
    if not stem.name or stem.suffix in (".png", ".md") or stem.parent.is_file():
        raise InputError(f"--out is the name of two files, without their endings .png and .md; {stem} is none.")
    runs = read_runs(folders)
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".md")]
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists already; give another --out.")
    stem.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, paths[0])
    paths[1].write_text(f"![{_headline(runs)}]({paths[0].name})\n\n{table(runs)}")
    return paths
