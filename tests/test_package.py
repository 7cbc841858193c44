"""The wheel works where the repository is not."""

import subprocess
import sys
import zipfile
from pathlib import Path

from hrpo_patches.patching import overlay

ROOT = Path(__file__).parents[1]


def test_the_wheel_carries_the_patches_and_the_licence_and_imports_elsewhere(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for patch in overlay.all_patches():
        assert f"hrpo_patches/patches/{patch.name}" in names
    assert {name.rsplit("/", 1)[-1] for name in names} >= {"LICENSE", "NOTICE", "METADATA"}
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import hrpo_patches\n"
        "assert str(hrpo_patches.patching.overlay.patches_root()).startswith(sys.path[0])\n"
        "from transformers.models.qwen2 import Qwen2Model; assert hasattr(Qwen2Model, 'blend_thinking')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_no_file_of_ours_is_longer_than_it_should_be():
    for folder in ("src", "scripts", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 500, file
