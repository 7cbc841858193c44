"""Every block of the tutorial runs, in order, in one folder: on a tiny model in the place of SmolLM2."""

import processes
from tutorial import run_tutorial


def forked(folder, program, words):
    """As a command line would, but in a process that has imported the libraries already."""
    command = processes.script if program == "python" else processes.hrpo
    return processes.run(processes.inside, folder, command.__name__, *words)


def test_the_tutorial_runs_from_its_first_block_to_its_last(tmp_path):
    ran = run_tutorial(tmp_path, run=forked)
    assert ran == ["make_data.py", "doctor", "sft", "eval", "train", "own_reward.py", "think", "report", "merge"]
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (tmp_path / "comparison.png").is_file()
