"""The diffs: the families' are their templates', each says why, and a patched file can be looked at."""

import inspect
import linecache

import pytest
from transformers import LlamaModel

from hrpo_patches.patching import export, overlay
from hrpo_patches.patching.placing import hunks_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES


def test_the_stored_diffs_of_the_families_are_those_of_the_templates():
    folder = overlay.patches_root() / "transformers"
    diffs = export.family_diffs()
    assert len(diffs) == 2 * len(FAMILIES)
    for name, text in diffs.items():
        assert (folder / name).read_text() == text, name


def test_refresh_writes_the_families_diffs(tmp_path):
    written = export.refresh(tmp_path)
    assert {file.name: file.read_text() for file in written} == export.family_diffs()


def test_every_diff_says_why_and_until_when_and_holds_only_what_it_needs():
    targets = [patch.target for patch in overlay.all_patches()]
    assert len(targets) == len(set(targets))
    for patch in overlay.all_patches():
        text = patch.file.read_text()
        header = [line for line in text[: text.index("--- a/")].splitlines() if line]
        generated = patch.package == "transformers" and patch.file.name in export.family_diffs()
        assert [line.split(":")[0] for line in header] == ["Why", "Drop-when"] + ["Generated"] * generated
        assert all(len(line.split(": ", 1)[1]) > 10 for line in header)
        for hunk in hunks_of(text):
            assert any(change.old != change.new for change in hunk.changes), (patch.name, hunk.scope)
            for change in hunk.changes:  # of one version's words nothing may change
                assert change.old and change.new, (patch.name, hunk.scope)
                assert sum(line in change.new for line in change.old) <= 4, (patch.name, hunk.scope)


def test_the_diffs_import_hooks_and_nothing_else_of_ours():
    for patch in overlay.all_patches():
        added = [
            line for line in patch.file.read_text().splitlines() if line.startswith("+") and "hrpo_patches" in line
        ]
        for line in added:
            assert "hrpo_patches.hooks import" in line or "import" not in line, (patch.name, line)


def test_checkout_writes_what_is_imported_and_overwrites_nothing(tmp_path):
    files = export.checkout(tmp_path)
    assert len(files) == len(export.installed_patches()) >= 8
    modeling = tmp_path / "transformers/models/llama/modeling_llama.py"
    assert modeling.read_text() == "".join(linecache.getlines(inspect.getsourcefile(LlamaModel)))
    with pytest.raises(InputError, match="would be overwritten"):
        export.checkout(tmp_path)
