"""The first day with a GPU: is thinking right there, does the main command run, how fast, then vLLM and unsloth.

    python tests/gpu/day.py OUT [--pack .gpu-day] [--only PIECE ...] [--dry_run]

It needs torch and transformers in this environment, and no network: what else is missing comes from --pack, which
`python tests/gpu/pack.py` makes beforehand. Every piece is a process of its own with a limit of time, and leaves
OUT/PIECE.txt; what broke does not stop the rest. OUT/day.json and the table OUT/day.md are written after each piece.
--dry_run takes a tiny model and a CPU, to see that the day itself works.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SITE = "site-packages"  # by which dill and others tell a library from a script


@dataclass
class Day:
    """What a piece may depend on: where results go, whether it is the dry run, and the model's folder."""

    out: Path
    dry: bool

    @property
    def model(self) -> Path:
        return self.out / "model"

    def train(self, name: str, *words: object) -> list[object]:
        """A command of `hrpo train` on the model, as the README has it but for length and number of steps."""
        length, steps = (8, 2) if self.dry else (256, 4)
        command = [sys.executable, "-m", "hrpo_patches", "train", "--backend", "transformers", "--task", "gsm8k"]
        command += ["--lr_thinking_projection", "1e-4", "--model_name", self.model, "--max_steps", steps]
        command += ["--dataset", self.out / "problems.jsonl", "--max_completion_length", length]
        command += ["--output_dir", self.out / "runs" / name, "--prompt", "plain"]
        small = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
        return [*command, *(small if self.dry else []), *words]

    def benchmark(self, name: str, *words: object, result: str = "") -> list[object]:
        """A benchmark on the model; its numbers go to a file of its name, or of that of the `result`."""
        command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--model_name", self.model]
        return [*command, "--out", self.out / f"{result or name}.json", *words]


@dataclass
class Piece:
    """One part of the day.

    Attributes:
        name: of the piece.
        seconds: after which it is stopped.
        command: what runs, by the day.
        needs: a package without which it is skipped, by name.
    """

    name: str
    seconds: int
    command: Callable[[Day], list[object]]
    needs: str = "torch"


DRY_KINDS = ("generate", "generate, thinking", "continuous", "continuous, thinking")


def _sizes(day: Day, small: list[object], large: list[object]) -> list[object]:
    return small if day.dry else large


PIECES = [
    Piece("correct", 420, lambda day: [sys.executable, HERE / "correct.py"]),
    Piece("model", 180, lambda day: [sys.executable, HERE / "model.py", day.out, *(["--tiny"] if day.dry else [])]),
    Piece("main command", 240, lambda day: day.train("main")),
    Piece("peak memory", 240, lambda day: day.train("memory", "--skip_memory_metrics", "false")),  # it slows steps
    Piece("plain GRPO", 240, lambda day: day.train("plain", "--residual", "none")),
    Piece("published gradient", 240, lambda day: day.train("published", "--bptt", 0)),
    Piece("continuous batching", 240, lambda day: day.train("continuous", "--engine", "continuous")),
    Piece("forced thoughts", 240, lambda day: day.train("forced", "--thoughts", 4, "--reference", "start")),
    Piece("plan", 180, lambda day: [sys.executable, "-m", "hrpo_patches", "info", day.model, "--plan",
                                    "--max_completion_length", 256, "--max_prompt_length", 320]),
    Piece("decode", 300, lambda day: day.benchmark("decode", *_sizes(day, ["--rounds", 1, "--tokens", 4], []))),
    Piece("step", 300, lambda day: day.benchmark(
        "step", *_sizes(day, ["--rounds", 1, "--length", 4, "--batch", 2], ["--rounds", 5, "--length", 128]))),
    Piece("bptt", 420, lambda day: day.benchmark("bptt", *_sizes(
        day, ["--rounds", 1, "--thoughts", 4, "--batch", 2], ["--rounds", 3, "--thoughts", 64]))),
    Piece("rollout", 420, lambda day: day.benchmark("rollout", "--rounds", 1, *_sizes(
        day, ["--prompts", 1, "--completions", 2, "--kinds", *DRY_KINDS], []))),
    Piece("vllm tests", 590, lambda day: [
        sys.executable, "-m", "pytest", "-q", "--confcutdir", ROOT / "tests" / "with_vllm",
        ROOT / "tests" / "with_vllm" / "test_training.py", ROOT / "tests" / "with_vllm" / "test_gpu_ready.py",
    ], needs="vllm"),
    Piece("vllm training", 300, lambda day: day.train("vllm", "--engine", "vllm"), needs="vllm"),
    Piece("unsloth tests", 590, lambda day: [
        sys.executable, "-m", "pytest", "-q", "--confcutdir", ROOT / "tests" / "gpu", ROOT / "tests" / "gpu",
    ], needs="unsloth"),
    Piece("unsloth decode", 300, lambda day: day.benchmark(
        "decode", "--backend", "unsloth", *_sizes(day, ["--rounds", 1, "--tokens", 4], []), result="decode-unsloth",
    ), needs="unsloth"),
]  # fmt: skip


@dataclass
class Result:
    """What became of a piece: ok, failed, stopped (by its limit) or skipped; numbers are what its log holds."""

    name: str
    became: str
    seconds: float
    numbers: list[str] = field(default_factory=list)


def numbers_of(day: Day, piece: Piece, text: str) -> list[str]:
    """The lines of a piece's output that belong into the table."""
    if piece.name == "correct":
        rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"check"')]
        wrong = [f"{row['check']}: {row.get('value', 'error')}" for row in rows if not row["holds"]]
        return [f"{len(rows) - len(wrong)} of {len(rows)} checks hold", *wrong]
    command = list(map(str, piece.command(day)))
    if "train" in command:
        folder = Path(command[command.index("--output_dir") + 1])
        return trained(folder)
    if piece.name.endswith("tests"):
        return re.findall(r"\d+ (?:passed|failed|skipped)", text)
    return [line.strip(" │┃") for line in text.splitlines() if line.lstrip().startswith("│")]


def trained(folder: Path) -> list[str]:
    """What a run's log says of its last step, and of memory."""
    rows = [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]
    step = [row for row in rows if "loss" in row][-1]
    report = json.loads((folder / "report.json").read_text())
    last = next((row for row in reversed(report["log"]) if "train_mem_gpu_peaked_delta" in row), {})
    held = sum(last.get(f"train_mem_gpu_{name}_delta", 0) for name in ("alloc", "peaked"))
    held += last.get("init_mem_gpu_alloc_delta", 0)
    if held:
        return [f"peak {held / 2**30:.2f} GiB of the GPU"]
    names = ("step_time", "loss", "grad_norm", "projection/grad_norm", "embeds_ratio", "thinking/length", "bptt/terms")
    return [f"{name} {step[name]:.4g}" for name in names if name in step]


def run(day: Day, piece: Piece, environment: dict[str, str]) -> Result:
    """Run one piece, and keep what it said."""
    if find_spec(piece.needs) is None:
        return Result(piece.name, "skipped", 0.0, [f"{piece.needs} is not installed"])
    log, started = day.out / f"{piece.name.replace(' ', '-')}.txt", time.monotonic()
    words = list(map(str, piece.command(day)))
    with log.open("w") as file:
        print(*words, file=file, flush=True)
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment, "cwd": ROOT}
        process = subprocess.Popen(words, start_new_session=True, **options)
        try:
            became = "ok" if process.wait(piece.seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            became = "stopped"
        finally:  # also what it has started, which would keep the GPU's memory
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    try:
        numbers = numbers_of(day, piece, text)
    except Exception as error:  # a log that ended early has no numbers
        numbers = [f"no numbers: {error}"]
    if became != "ok":
        numbers += text.strip().splitlines()[-1:]
    return Result(piece.name, became, time.monotonic() - started, numbers)


def table_of(results: list[Result], machine: str) -> str:
    """The day as a table in Markdown."""
    lines = [machine, "", "| piece | result | seconds | numbers |", "|---|---|---|---|"]
    for one in results:
        numbers = "; ".join(" ".join(line.replace("│", ",").split()) for line in one.numbers).replace("|", "/")
        lines.append(f"| {one.name} | {one.became} | {one.seconds:.0f} | {numbers[:600]} |")
    return "\n".join(lines) + "\n"


def install(pack: Path, out: Path) -> None:
    """Put the wheels of a pack beside the environment's own packages, which stay as they are."""
    wheels = sorted(pack.rglob("*.whl"))
    if not wheels:
        raise SystemExit(f"{pack} holds no wheels; make it with python tests/gpu/pack.py {pack}.")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", out / SITE]
    subprocess.run([*map(str, command), *map(str, wheels)], check=True)


def chosen(day: Day, names: list[str] | None) -> list[Piece]:
    """The pieces of these names, or all; with the model, if one of them reads it."""
    pieces = [piece for piece in PIECES if not names or piece.name in names]
    if any(day.model in piece.command(day) for piece in pieces):
        names = [*(piece.name for piece in pieces), "model"]
    return [piece for piece in PIECES if not names or piece.name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where results go; must not exist")
    parser.add_argument("--pack", type=Path, help="folder with the wheels that this machine lacks")
    parser.add_argument("--only", nargs="+", choices=[piece.name for piece in PIECES], help="these pieces alone")
    parser.add_argument("--dry_run", action="store_true", help="a tiny model, on a CPU too")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not args.dry_run:
        raise SystemExit("torch sees no GPU here; --dry_run tries the day itself on a CPU.")
    args.out.mkdir(parents=True)
    day = Day(args.out.resolve(), args.dry_run)
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "unsloth"), str(ROOT / "benchmarks"), str(ROOT / "src")]
    if args.pack:
        install(args.pack, day.out)
        sys.path.append(str(day.out / SITE))
        paths.append(str(day.out / SITE))  # after the checkout, whose package it holds, too
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["COLUMNS"] = "200"  # of the benchmarks' tables
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (dry run)"
    machine = f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    results = []
    pieces = chosen(day, args.only)
    for number, piece in enumerate(pieces, 1):
        print(f"{number}/{len(pieces)} {piece.name} ...", end=" ", flush=True)
        result = run(day, piece, environment)
        results.append(result)
        print(f"{result.became}, {result.seconds:.0f} s", flush=True)
        (day.out / "day.json").write_text(json.dumps([machine, *map(asdict, results)], indent=1) + "\n")
        (day.out / "day.md").write_text(table_of(results, machine))
    print((day.out / "day.md").read_text())
    return int(any(result.became in ("failed", "stopped") for result in results))


if __name__ == "__main__":
    sys.exit(main())
