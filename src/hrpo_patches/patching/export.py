"""Writes the patched upstream files into a folder to be read, and the families' diffs; for maintainers."""

from __future__ import annotations

from pathlib import Path

from hrpo_patches.patching.overlay import Patch, all_patches, installed_source, patched_source, patches_root, site_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES

_KINDS = {"modeling": "{family}.patch", "config": "{family}-config.patch"}  # a template each


def installed_patches() -> list[Patch]:
    """The diffs whose package is installed."""
    return [patch for patch in all_patches() if site_of(patch.package) is not None]


def checkout(folder: Path) -> list[Path]:
    """Write the patched file of every installed diff under `folder`.

    Raises:
        InputError: a file is already there.
        PatchError: a diff does not fit what is installed.
    """
    targets = {patch: folder / patch.target for patch in installed_patches()}
    if existing := [target for target in targets.values() if target.exists()]:
        raise InputError(f"{existing[0]} exists and would be overwritten; give an empty folder.")
    for patch, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(patched_source(patch, installed_source(patch)), encoding="utf-8")
    return list(targets.values())


def family_diffs() -> dict[str, str]:
    """The text of each family's diffs, by file name under patches/transformers/, from the templates."""
    diffs = {}
    for kind, name in _KINDS.items():
        template = (patches_root() / f"family-{kind}.template").read_text(encoding="utf-8")
        for model_type, family in FAMILIES.items():
            text = template.replace("{Family}", family.name).replace("{family}", model_type)
            source = f"Generated: from patches/family-{kind}.template by `hrpo refresh`; edit the template.\n"
            text = text.replace("\n\n---", f"\n{source}\n---", 1)
            diffs[name.replace("{family}", model_type)] = text
    return diffs


def refresh(into: Path | None = None) -> list[Path]:
    """Write the families' diffs; `into` defaults to the project's `patches/transformers/`."""
    folder = into or patches_root() / "transformers"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in family_diffs().items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written
