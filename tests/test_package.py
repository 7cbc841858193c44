"""The wheel works where the repository is not."""

import os
import shutil
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


def test_the_rule_of_who_imports_whom_holds_and_can_fail(tmp_path):
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    for line, broken in ((None, 0), ("from hrpo_patches.training import optim", 1)):
        if line is not None:
            file = tmp_path / "src" / "hrpo_patches" / "tasks" / "gym.py"
            file.write_text(file.read_text() + f"\n{line}\n")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == broken, done.stdout
