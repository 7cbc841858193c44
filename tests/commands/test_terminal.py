"""What a command writes into a file or a pipe is plain text, whole, and only what its reader needs."""

import json
import os
import re
import subprocess
import sys

from runs import run_of_sums

from hrpo_patches.commands.main import main

SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 8,
}


def test_training_into_a_file_is_a_line_for_each_step_and_the_log_has_the_rest(tmp_path):
    words = [*run_of_sums(tmp_path, 4, eval_problems=2, **SMALL), "--output_dir", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    command = [sys.executable, "-m", "hrpo_patches", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    number = r"[\d.e-]+"
    shown = rf"loss {number}  reward {number}  marker \d+%  thinking {number} tokens"
    pattern = rf"step \d/2  {shown}  {number} s/step  [\d:]+ left"
    lines = done.stdout.splitlines()
    assert len([line for line in lines if re.fullmatch(pattern, line)]) == 2, done.stdout
    assert not any(line.startswith("{") for line in lines)
    assert not set("\r\x1b") & set(done.stdout + done.stderr) and "it/s" not in done.stderr
    assert "FutureWarning" not in done.stderr
    rows = list(map(json.loads, (tmp_path / "run" / "monitor.jsonl").read_text().splitlines()))
    assert [len(row) > 40 for row in rows if "loss" in row] == [True, True]


def test_the_whole_log_is_printed_where_it_is_asked_for(tmp_path, capsys):
    words = [*run_of_sums(tmp_path, 4, **SMALL | {"max_steps": 1}), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words, "--disable_tqdm", "true"]) == 0
    shown = capsys.readouterr().out
    assert "'projection/grad_norm': " in shown and "s/step" not in shown


def test_tables_in_a_pipe_lose_nothing(tmp_path, capsys):
    words = run_of_sums(tmp_path, 3)
    model, data = words[words.index("--model_name") + 1], words[words.index("--dataset") + 1]
    flags = ["--prompt", "plain", "--limit", "2", "--max_new_tokens", "4", "--no-thinking", "--thoughts", "1", "2"]
    assert main(["eval", "--model", model, "--dataset", data, *flags, "--out", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in (" difference ", " partner's answer ", " 0.000 to 0.658 ")), shown
    assert f"against the fewest; {tmp_path / 'out.json'}\n" in shown and "\x1b" not in shown and "…" not in shown
    assert main(["think", model, "--prompt", "3+4?", "--max_new_tokens", "3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 3 and all(
        len(re.findall(r" -?\d\.\d\d(?!\d)", row)) == 4 for row in rows
    )  # cosines and entropy
    assert main(["status"]) == 0
    assert all(line.startswith(("│", "┃", "┏", "┡", "└", " ")) for line in capsys.readouterr().out.splitlines())
