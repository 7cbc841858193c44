"""Which released unsloth versions the diffs match: fetches the last eight wheels, writes docs/compatibility.md.

Nothing is installed or imported from the wheels; the diffs are applied in memory. Needs the package registry.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email import message_from_string
from pathlib import Path

from rich.progress import track
from whatthepatch import parse_patch

from hrpo_patches.errors import PatchError
from hrpo_patches.overlay import Patch, all_patches, patched_source

PACKAGE = "unsloth"
DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
INTRODUCTION = f"""# Which versions of {PACKAGE} the patches match

Made by `make patch-matrix`, which fetches the last wheels from the package registry and applies the diffs in memory.
A version is supported where every hunk of every diff matches at its line; anything else is refused when {PACKAGE} is
imported, with the version and what to install. "Elsewhere" counts the hunks whose lines are in the file once, at
another place: they show how far a new version is from a port, and are never applied.
"""


def pip(*arguments: str) -> str:
    """Run pip; returns what it printed."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: pip {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def latest(count: int) -> list[str]:
    """The newest released versions, newest first."""
    line = next(line for line in pip("index", "versions", PACKAGE).splitlines() if line.startswith("Available"))
    return line.partition(":")[2].replace(",", " ").split()[:count]


def hunks(patch: Patch, source: str) -> tuple[int, int, int]:
    """How many hunks match at their line, how many only elsewhere (once), and how many there are."""
    (diff,) = parse_patch(patch.file.read_text())
    lines = source.split("\n")
    blocks: dict[int, list[tuple[int, str]]] = {}
    for change in diff.changes:
        if change.old is not None:
            blocks.setdefault(change.hunk, []).append((change.old, change.line))
    here = elsewhere = 0
    for block in blocks.values():
        wanted, start = [line for _, line in block], block[0][0] - 1
        places = [i for i in range(len(lines)) if lines[i : i + len(wanted)] == wanted]
        here += start in places
        elsewhere += start not in places and len(places) == 1
    return here, elsewhere, len(blocks)


def row(wheel: Path) -> list[str]:
    """One line of the table."""
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        needs = message_from_string(archive.read(metadata).decode()).get_all("Requires-Dist") or []
        cells, exact = [], True
        for patch in (patch for patch in all_patches() if patch.package == PACKAGE):
            source = archive.read(patch.target).decode()
            try:
                patched_source(patch, source)
            except PatchError:
                exact = False
            here, elsewhere, total = hunks(patch, source)
            cells.append(f"{here} of {total}" + (f", {elsewhere} elsewhere" if elsewhere else ""))
    bounds = [re.search(r"<=?([\d.]+)", need) for need in needs if re.match(r"transformers\b(?!.*extra)", need)]
    newest = next((bound.group(1) for bound in bounds if bound), "-")
    return [version, "**yes**" if exact else "no", *cells, newest]


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, compare, write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--versions", type=int, default=8, help="how many of the newest versions")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="the document to write")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for version in track(latest(arguments.versions), "Fetching wheels"):
            pip("download", "--quiet", "--no-deps", "--dest", folder, f"{PACKAGE}=={version}")
            rows.append(row(next(Path(folder).glob(f"{PACKAGE}-{version}-*.whl"))))
    names = [patch.file.name for patch in all_patches() if patch.package == PACKAGE]
    header = [PACKAGE, "supported", *(f"hunks of {name}" for name in names), "newest transformers it takes"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    arguments.out.write_text(INTRODUCTION + "\n" + "\n".join(lines) + "\n")
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
