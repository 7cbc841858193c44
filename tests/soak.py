"""Run as a program: a training that is killed again and again ends as one that nobody disturbs; says whether it did.

`python tests/soak.py OUT` trains a tiny model twice at once, with the same seed. One run is killed at random moments,
by SIGKILL or SIGTERM, and resumed each time; in the end weights and log of both are compared, bit for bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import hrpo_patches  # isort: skip - before transformers

import torch
from rich.progress import Progress
from runs import run_of_sums
from safetensors.torch import load_file

assert hrpo_patches.__version__
TIMES = ("time", "per_second", "runtime")  # in the names of what is measured with a clock


def words_of(out: Path, steps: int) -> list[str]:
    """The command that trains, without its folder; model and data are written into `out`."""
    options = {"group_size": 4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "beta": 0.1}
    options |= {"max_completion_length": 64, "temperature": 1, "projection_dropout": 0.1, "max_steps": steps}
    options |= {"save_steps": 20, "logging_steps": 1, "save_total_limit": 2, "report": "false", "disable_tqdm": "true"}
    return [sys.executable, "-m", "hrpo_patches", "train", *run_of_sums(out, 10, **options)]


def start(words: list[str], folder: Path, log: Path) -> subprocess.Popen:
    """Begin the run in a folder, or resume it there."""
    begun = any(folder.glob("checkpoint-*/trainer_state.json"))
    resumed = ["--resume_from_checkpoint", "latest"] if begun else []
    if not begun and folder.exists():
        for file in folder.iterdir():  # killed before it had saved anything
            file.unlink()
    with log.open("a") as out:
        return subprocess.Popen([*words, "--output_dir", folder, *resumed], stdout=out, stderr=out)


def step_of(folder: Path) -> int:
    """How far a run has come."""
    log = folder / "monitor.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.is_file() else ""  # a line may be under way
    return json.loads(whole.rpartition("\n")[2])["step"] if whole else 0


def logged(folder: Path) -> list[dict]:
    """What a run logged, without what a clock measured."""
    rows = json.loads((folder / "report.json").read_text())["log"]
    return [{key: value for key, value in row.items() if not any(part in key for part in TIMES)} for row in rows][:-1]


def soak(out: Path, steps: int, every: float, seed: int) -> dict:
    """Both runs, to their ends; what happened, and whether they are the same."""
    words, moments = words_of(out, steps), random.Random(seed)
    calm, rough = out / "calm", out / "rough"
    began, ended = time.monotonic(), {}
    undisturbed = start(words, calm, out / "calm.log")
    counts = {"SIGKILL": 0, "SIGTERM": 0}
    with Progress() as bar:
        task = bar.add_task("rough", total=steps)
        while True:
            process, until = start(words, rough, out / "rough.log"), time.monotonic() + moments.expovariate(1 / every)
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
                bar.update(task, completed=step_of(rough))
            if process.poll() == 0:
                break
            if process.poll() is not None:
                raise SystemExit(f"the run failed by itself, see {out / 'rough.log'}")
            name = moments.choice(list(counts))
            counts[name] += 1
            process.send_signal(getattr(signal, name))
            process.wait()
    ended["minutes"] = round((time.monotonic() - began) / 60, 1)
    if undisturbed.wait():
        raise SystemExit(f"the undisturbed run failed, see {out / 'calm.log'}")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (rough, calm))
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    return ended | {
        "steps": steps,
        "seed": seed,
        "signals": counts,
        "weights are equal": same,
        "logs are equal": logged(rough) == logged(calm),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--steps", type=int, default=10_000, help="of each run; the default takes some two hours")
    parser.add_argument("--every", type=float, default=40.0, help="seconds between signals, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    found = soak(given.out, given.steps, given.every, given.seed)
    (given.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if found["weights are equal"] and found["logs are equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
