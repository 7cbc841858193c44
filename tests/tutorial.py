"""Runs the blocks of docs/tutorial.md in a folder, with this Python and a tiny model in the place of SmolLM2.

`make release-check` runs it as a script, up to the first training block, with the Python that has the wheel.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hrpo_patches  # isort: skip - before transformers
from tiny import byte_tokenizer, tiny_model

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
SKIPPED = ("pip install", "hrpo serve")  # an installation, and an engine that these environments lack


def in_a_process(folder, program, words):
    """Run `python WORDS` or `hrpo WORDS` in a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *([] if program == "python" else ["-m", "hrpo_patches"]), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_tutorial(folder: Path, last: str = "", run=in_a_process) -> list[str]:
    """Run every block in order, or all up to the first `hrpo LAST`, each command by `run`.

    Returns:
        The first word of each command after `hrpo` or `python`.

    Raises:
        SystemExit: a command failed; what it printed is in the message.
    """
    tiny_model("llama", thinking=False, max_position_embeddings=1024).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    ran: list[str] = []
    for kind, block in re.findall(r"```(python|console)\n(.*?)```", TEXT, re.S):
        block = block.replace("smollm2-135m", "tiny")
        if kind == "python":
            (folder / re.match(r"# (\S+)\n", block)[1]).write_text(block)
            continue
        for line in re.findall(r"^\$ (.*)$", block, re.M):
            if line.startswith(SKIPPED):
                continue
            program, *words = shlex.split(line, comments=True)
            done = run(folder, program, words)
            if done.returncode != 0:
                raise SystemExit(f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
            ran.append(words[0])
            if words[0] == last:
                return ran
    return ran


if __name__ == "__main__":
    print(f"hrpo_patches {hrpo_patches.__version__} of {Path(hrpo_patches.__file__).parent}")
    print("ran", *run_tutorial(Path.cwd(), last="sft"))
    if not (Path.cwd() / "runs" / "sft" / "adapter_model.safetensors").is_file():
        raise SystemExit("the first training block left no adapter.")
