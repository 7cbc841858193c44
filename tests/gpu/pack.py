"""Packs what `day.py` needs on a machine that has torch and transformers, and cannot fetch anything.

    python tests/gpu/pack.py .gpu-day [--python 3.12] [--piece_mib 62]

Wheels of this project, and of what it needs beside torch and transformers and all that these need. They are put into
.gpu-day/1, .gpu-day/2 ... of at most so many MiB, for machines that take a limited size at once; there, carry them one
after the other into one folder, and run `python tests/gpu/day.py OUT --pack FOLDER`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
THERE = ("torch", "transformers")
BESIDE = ("pytest", "bitsandbytes")
MIB = 2**20


def pip(*words: object) -> str:
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words)], check=True, capture_output=True, text=True
    ).stdout


def closure(names: list[str], packages: dict[str, dict]) -> set[str]:
    """These packages and all that they need, of those in a report of pip's."""
    found: set[str] = set()
    left = [*names]
    while left:
        name = canonicalize_name(left.pop())
        if name in found or name not in packages:
            continue
        found.add(name)
        needs = map(Requirement, packages[name]["metadata"].get("requires_dist", []))
        left += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def pack(out: Path, python: str, limit: int) -> list[Path]:
    """Download and build the wheels, and sort them into pieces.

    Raises:
        SystemExit: a wheel alone is larger than a piece.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [one for one in project["dependencies"] if not re.match(r"(?:torch|transformers)\b", one)]
    target = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    for version in ("2014", "_2_17", "_2_24", "_2_27", "_2_28"):
        target += ["--platform", f"manylinux{version}_x86_64"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        limits = ["-c", ROOT / "constraints" / "newest.txt"]
        report = pip(
            "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--target", folder / "none",
            *target, *limits, *own, *BESIDE,
        )  # fmt: skip
        packages = {canonicalize_name(one["metadata"]["name"]): one for one in json.loads(report)["install"]}
        needed = sorted(set(packages) - closure(list(THERE), packages))
        exact = [f"{name}=={packages[name]['metadata']['version']}" for name in needed]
        pip("download", "--quiet", "--no-deps", "-d", folder / "wheels", *target, *exact)
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--wheel",
            "--outdir",
            str(folder / "wheels"),
            str(ROOT),
        ]
        subprocess.run(command, check=True, capture_output=True)
        pieces: list[tuple[Path, int]] = []
        for wheel in sorted((folder / "wheels").iterdir(), key=lambda one: -one.stat().st_size):
            size = wheel.stat().st_size
            if size > limit:
                raise SystemExit(f"{wheel.name} has {size / MIB:.0f} MiB; a piece has {limit / MIB:.0f}.")
            place_of = next((i for i, (_, full) in enumerate(pieces) if full + size <= limit), None)
            if place_of is None:
                place_of = len(pieces)
                pieces.append((out / str(place_of + 1), 0))
                pieces[place_of][0].mkdir(parents=True)
            shutil.copy(wheel, pieces[place_of][0])
            pieces[place_of] = (pieces[place_of][0], pieces[place_of][1] + size)
    return [folder for folder, _ in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="must not exist")
    parser.add_argument("--python", default="3.12", help="version of Python there (default: 3.12)")
    parser.add_argument("--piece_mib", type=int, default=62, help="the most in a piece (default: 62)")
    args = parser.parse_args()
    for piece in pack(args.out, args.python, args.piece_mib * MIB):
        wheels = sorted(piece.iterdir())
        print(f"{piece}: {sum(one.stat().st_size for one in wheels) / MIB:.0f} MiB, {len(wheels)} wheels")


if __name__ == "__main__":
    main()
