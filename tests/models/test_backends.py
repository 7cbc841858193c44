"""Which backend a run gets, why, and how that is said."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from runs import parse

from hrpo_patches.commands.flags import split_backend, with_config
from hrpo_patches.models import backends as backend
from hrpo_thinking.errors import InputError, PatchError


@pytest.fixture
def installed(monkeypatch):
    """Make it look as if this version of unsloth were installed, beside a GPU or none."""

    def pretend(version, gpu):
        monkeypatch.setattr(backend, "installed_version", lambda package: version)
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)

        def check(package):
            if version != "2026.10.7":
                raise PatchError(f"patches for 2026.10.7, but {version} is installed")

        monkeypatch.setattr(backend, "check", check)

    return pretend


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "auto"),
        (["--backend", "unsloth"], "unsloth"),
        (["--backend=transformers", "--lr", "1"], "transformers"),
        (["--config", "CONFIG"], "unsloth"),
        (["--config", "CONFIG", "--backend", "transformers"], "transformers"),
    ],
)
def test_the_wish_is_read_from_flags_and_then_from_the_config_file(argv, wanted, tmp_path):
    (tmp_path / "CONFIG").write_text("lr: 1.0e-4\nbackend: unsloth\n")
    assert split_backend(with_config([str(tmp_path / a) if a.isupper() else a for a in argv]))[0] == wanted


def test_auto_takes_unsloth_where_it_is_installed_and_a_gpu_is_there(installed, monkeypatch):
    installed("2026.10.7", gpu=True)
    monkeypatch.delitem(sys.modules, "transformers")
    assert backend.choose_backend("auto") == ("unsloth", "it is installed and a GPU is there")
    assert backend.choose_backend("unsloth") == ("unsloth", "asked for")


@pytest.mark.parametrize(
    ("version", "gpu", "why"),
    [
        (None, True, "unsloth is not installed"),
        ("2026.10.7", False, "no GPU is there"),
        ("2026.9.1", False, "patches for 2026.10.7, but 2026.9.1 is installed"),
        ("2026.9.1", True, "patches for 2026.10.7, but 2026.9.1 is installed"),
        ("2026.10.7", True, "transformers was imported first"),
    ],
)
def test_otherwise_auto_takes_transformers_and_asking_for_unsloth_is_an_error(installed, version, gpu, why):
    installed(version, gpu)
    chosen, reason = backend.choose_backend("auto")
    assert chosen == "transformers" and why in reason
    with pytest.raises((InputError, PatchError), match=why):
        backend.choose_backend("unsloth")


def test_what_was_chosen_and_why_is_one_line_once(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_said", [])
    assert backend.start_backend("transformers") == backend.start_backend("auto") == "transformers"
    assert capsys.readouterr().out == f"backend: transformers {version('transformers')} (asked for)\n"


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    for refuse in (lambda: backend.choose_backend("jax"), lambda: parse(["--backend", "jax"])):
        with pytest.raises(InputError, match="--backend must be auto, transformers or unsloth, not 'jax'"):
            refuse()


def test_choosing_imports_no_transformers():
    program = (
        "import sys; from hrpo_patches.commands import main; from hrpo_patches.models.backends import choose_backend; "
        "choose_backend('auto'); assert not {'transformers', 'trl', 'peft'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
