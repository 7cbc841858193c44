"""What `upstream.TABLE` finds missing in an installed package, in sentences; for tests in each environment."""

import re
from itertools import chain
from pathlib import Path

import hrpo_patches
from hrpo_patches.patching.declared import gone, rows_of

SRC = Path(hrpo_patches.__file__).parents[1]
TEXTS = {path: path.read_text() for path in sorted(SRC.glob("hrpo_*/**/*.py")) if path.name != "upstream.py"}
WORDS = {path: set(re.findall(r"\w+", text)) for path, text in TEXTS.items()}


def plain_names(row):
    """For each name of a row, its spellings in the versions that differ, without parameters."""
    return [[one.partition("(")[0] for one in name.split(" | ")] for name in row.names]


def users(names):
    """The files of src/ that have one of the names."""
    return [str(path.relative_to(SRC)) for path, words in WORDS.items() if not words.isdisjoint(names)]


def complaints(package, version):
    """What the installed version lacks: the row, why we need it, and the files of ours that lean on it."""
    return [
        f"{package} {version}: {row.where} has {has or 'no such name'}, expected {name}. We {row.use} it because "
        f"{row.why}, in {', '.join(users([*chain(*plain_names(row))]))}; drop the row when: {row.drop_when}."
        for row, name, has in gone(rows_of(package, version))
    ]
