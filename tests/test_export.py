"""The diffs are what an edited tree gives; none has been edited by hand."""

import pytest

from hrpo_patches import export, overlay
from hrpo_patches.errors import InputError


def test_the_diffs_have_not_drifted_from_what_refresh_writes(tmp_path):
    export.checkout(tmp_path / "tree")
    written = export.refresh(tmp_path / "tree", tmp_path / "patches")
    assert len(written) == len(export.installed_patches()) >= 8
    for patch, file in zip(export.installed_patches(), written, strict=True):
        assert file.read_text() == patch.file.read_text(), patch.file.name


def test_an_edit_to_the_tree_is_in_the_refreshed_diff(tmp_path):
    tree = tmp_path / "tree"
    files = export.checkout(tree)
    (at,) = [i for i, file in enumerate(files) if file.name == "modeling_llama.py"]
    target = files[at]
    target.write_text(
        target.read_text().replace("self.add_thinking_modules(config)", "self.add_other_modules(config)")
    )
    written = export.refresh(tree, tmp_path / "patches")[at]
    assert "+        self.add_other_modules(config)" in written.read_text()


def test_every_diff_says_why_for_which_version_and_until_when():
    for patch in overlay.all_patches():
        header = export.header_of(patch.file.read_text()).splitlines()
        assert [line.split(":")[0] for line in header if line] == ["Why", "Upstream-version", "Drop-when"]
        assert header[1] == f"Upstream-version: {patch.package} {patch.version}"
        assert all(len(line.split(": ", 1)[1]) > 10 for line in header if line)


def test_checkout_overwrites_nothing_and_refresh_misses_nothing(tmp_path):
    files = export.checkout(tmp_path)
    with pytest.raises(InputError, match="would be overwritten"):
        export.checkout(tmp_path)
    files[0].unlink()
    with pytest.raises(InputError, match="is missing"):
        export.refresh(tmp_path, tmp_path / "out")
