"""Every block of the tutorial runs, in order, in one folder: on a tiny model in the place of SmolLM2."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tiny import byte_tokenizer, tiny_model

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
SKIPPED = ("pip install", "hrpo serve")  # an installation, and an engine that this environment lacks


def test_the_tutorial_runs_from_its_first_block_to_its_last(tmp_path):
    tiny_model("llama", thinking=False, max_position_embeddings=1024).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    ran = []
    for kind, block in re.findall(r"```(python|console)\n(.*?)```", TEXT, re.S):
        block = block.replace("smollm2-135m", "tiny")
        if kind == "python":
            (tmp_path / re.match(r"# (\S+)\n", block)[1]).write_text(block)
            continue
        for line in re.findall(r"^\$ (.*)$", block, re.M):
            if line.startswith(SKIPPED):
                continue
            program, *words = shlex.split(line, comments=True)
            command = [sys.executable, *([] if program == "python" else ["-m", "hrpo_patches"]), *words]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-3000:])
            ran.append(words[0])
    assert ran == ["make_data.py", "doctor", "sft", "eval", "train", "own_reward.py", "think", "report", "merge"]
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (tmp_path / "comparison.png").is_file()
