"""Python programs in processes of their own, and the checkpoints that they compute with."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A decay this strong makes a wrong blend show. The extra rows are for the token that Qwen2's tokenizer adds.
OPTIONS = {"vocab_size": 288}
THINKING = {"r_min": 0.3, "r_max": 0.6}
MAKE_CHECKPOINTS = f"""
import hrpo_patches, sys
from probes import FAMILIES
from tiny import byte_tokenizer, tiny_model
for family in FAMILIES:
    for name, thinking in ((family, {THINKING}), ("plain-" + family, None)):
        model = tiny_model(family, thinking=thinking, **{OPTIONS})
        model.save_pretrained(sys.argv[1] + "/" + name)
        byte_tokenizer().save_pretrained(sys.argv[1] + "/" + name)
"""


def environment():
    """This process's, with the tests' helpers importable and the devices not yet stubbed."""
    stubbed = ("UNSLOTH_ALLOW_CPU", "UNSLOTH_COMPILE_DISABLE", "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE")
    kept = {name: value for name, value in os.environ.items() if name not in stubbed}
    path = [str(HERE), str(HERE.parent), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path)}


def python(*arguments):
    """Run Python in a process of its own; returns what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def odd_reward(completions, **_):
    """A reward that differs within a group of a random model's completions; none of them ever answers."""
    return [sum(completion.encode()) % 7 / 7 for completion in completions]
