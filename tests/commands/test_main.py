"""`python -m hrpo_patches`."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tiny import tiny_config

from hrpo_patches.commands import main as cli
from hrpo_patches.commands import maintain
from hrpo_patches.patching import overlay


def test_status_in_a_fresh_process_names_every_target_and_its_state():
    command = [sys.executable, "-m", "hrpo_patches", "status"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "220"})
    for patch in overlay.all_patches():
        (line,) = [line for line in result.stdout.splitlines() if f" {patch.name} " in line]
        assert patch.target in line and patch.package in line
        assert "not yet imported (fits)" in line or "package not installed" in line


def test_status_after_loading_says_applied():
    for patch in overlay.all_patches():
        if overlay.installed_version(patch.package) is not None:
            __import__(patch.module)
            assert overlay.state_of(patch) == "applied"


def test_a_module_that_cannot_be_imported_is_a_line_and_not_a_traceback(monkeypatch, capsys):
    def no_gpu(module):
        raise NotImplementedError("you need a GPU")

    monkeypatch.setattr(maintain, "import_module", no_gpu)
    assert cli.main(["status", "--load"]) == 0
    assert "could not be imported: you need a GPU" in capsys.readouterr().out


def test_status_says_what_is_refused_and_fails(monkeypatch, capsys):
    patch = next(p for p in overlay.all_patches() if p.package == "transformers")
    old = patch._replace(target="transformers/models/gpt2/modeling_gpt2.py")
    monkeypatch.setattr(overlay, "all_patches", lambda: (old,))
    assert overlay.state_of(old).startswith("refused: hrpo_patches cannot patch transformers")
    assert cli.main(["status"]) == 1
    assert "refused" in capsys.readouterr().out


def test_checkout_and_refresh_are_commands(tmp_path, capsys):
    assert cli.main(["checkout", str(tmp_path / "tree")]) == 0
    assert cli.main(["refresh", "--into", str(tmp_path / "out")]) == 0
    assert "llama.patch" in capsys.readouterr().out
    stored = Path(__file__).parents[2] / "docs" / "options.md"
    assert (tmp_path / "out" / "options.md").read_text() == stored.read_text(), "run `hrpo refresh`"
    assert cli.main(["checkout", str(tmp_path / "tree")]) == 2
    assert "error: " in capsys.readouterr().err


def test_info_is_a_command_and_its_errors_are_sentences(tmp_path, capsys):
    tiny_config("qwen2").save_pretrained(tmp_path)
    assert cli.main(["info", str(tmp_path), "--projection_layers", "2", "--projection_hidden", "48"]) == 0
    shown = capsys.readouterr().out
    assert f"{2 * 32 * 48:,}" in shown and "times the projection" in shown
    assert cli.main(["info", str(tmp_path), "--projection_hidden", "48"]) == 2
    assert "error: projection_hidden is the width between two layers" in capsys.readouterr().err
    assert cli.main(["info", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "lm_eval"])  # whose help is its own
def test_the_help_of_a_command_has_the_defaults_that_there_are(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and f"usage: hrpo {command}" in shown
    assert "default: None" not in shown and "default: []" not in shown and "`0.0` (default)" not in shown
    assert command != "train" or ("(default: 0.005)" in shown and "--no_monitor" in shown)
    assert command != "think" or "where the completion is cut (default: 64)" in shown


def test_a_command_hides_what_libraries_say_of_each_others_names_and_nothing_else():
    old = "`gradient_checkpointing` is deprecated and will be removed in v6. Use `activation_checkpointing` instead."

    def entry(argv):
        warnings.warn(old, FutureWarning, stacklevel=1)
        warnings.warn(f"`is_{old[1:]}", FutureWarning, stacklevel=1)
        warnings.warn("`loss` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)

    with pytest.warns(FutureWarning) as shown:
        assert cli.exit_status(entry, []) == 0
    assert [str(warning.message)[:6] for warning in shown] == ["`loss`"]
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):  # a program that is not a command sees it
        warnings.warn(old, FutureWarning, stacklevel=1)


@pytest.mark.parametrize(("rank", "printed"), [("0", "3 of 4\nlonger\n"), ("1", "")])
def test_what_the_library_logs_is_printed_by_the_first_process(monkeypatch, capsys, rank, printed):
    logger = logging.getLogger("hrpo_patches.tasks.prompts")
    monkeypatch.setenv("RANK", rank)

    def entry(argv):
        logger.info("3 of 4")
        logger.warning("longer")

    assert cli.exit_status(entry, []) == 0
    assert capsys.readouterr().err == printed
    assert not logging.getLogger("hrpo_patches").handlers
