"""Writes the patched upstream files into a folder, and turns such an edited folder back into diffs; for maintainers.

`checkout` and `refresh` are each other's inverse, so a diff is never edited by hand: edit the file, then refresh.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from hrpo_patches.errors import InputError
from hrpo_patches.overlay import Patch, all_patches, installed_version, patched_source, patches_root, site_of

_CONTEXT = 2  # lines; what locates a hunk and no more


def _original(patch: Patch) -> str:
    site = site_of(patch.package)
    if site is None or installed_version(patch.package) != patch.version:
        raise InputError(f"{patch.package} {patch.version} has to be installed; run: pip install "
                         f"{patch.package}=={patch.version}")  # fmt: skip
    return (site / patch.target).read_text(encoding="utf-8")


def installed_patches() -> list[Patch]:
    """The diffs whose package is installed in their version."""
    return [patch for patch in all_patches() if installed_version(patch.package) == patch.version]


def checkout(folder: Path) -> list[Path]:
    """Write the patched file of every installed diff under `folder`, ready to be edited.

    Raises:
        InputError: a file is already there.
    """
    targets = {patch: folder / patch.file.parent.name / patch.target for patch in installed_patches()}
    if existing := [target for target in targets.values() if target.exists()]:
        raise InputError(f"{existing[0]} exists and would be overwritten; give an empty folder.")
    for patch, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(patched_source(patch, _original(patch)), encoding="utf-8")
    return list(targets.values())


def header_of(diff: str) -> str:
    """The lines before the first hunk's file names: Why, Upstream-version and Drop-when."""
    return diff[: diff.index("--- a/")]


def diff_of(patch: Patch, edited: str) -> str:
    """The text of the diff that turns the installed file into `edited`, under the header that `patch` has now."""
    lines = difflib.unified_diff(
        _original(patch).splitlines(keepends=True),
        edited.splitlines(keepends=True),
        f"a/{patch.target}",
        f"b/{patch.target}",
        n=_CONTEXT,
    )
    return header_of(patch.file.read_text()) + "".join(lines)


def refresh(folder: Path, into: Path | None = None) -> list[Path]:
    """Regenerate the diffs from the edited tree that `checkout` made; `into` defaults to the project's `patches/`.

    Raises:
        InputError: a file of the tree is missing, or an upstream version is not installed.
    """
    written = []
    for patch in installed_patches():
        edited = folder / patch.file.parent.name / patch.target
        if not edited.is_file():
            raise InputError(f"{edited} is missing; make the tree with: python -m hrpo_patches checkout {folder}")
        out = (into or patches_root()) / patch.file.parent.name / patch.file.name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(diff_of(patch, edited.read_text(encoding="utf-8")), encoding="utf-8")
        written.append(out)
    return written
