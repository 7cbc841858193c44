"""A wrong value of any flag is a sentence that names it, and so is a mistyped name; a bug keeps its trace."""

from pathlib import Path

import pytest
from every_flag import base_run, cases, tried
from huggingface_hub import constants

from hrpo_patches.commands.eval import parse as parse_eval
from hrpo_patches.commands.flags import plain_parser, with_config
from hrpo_patches.commands.main import main
from hrpo_patches.commands.refusals import flags_in, in_a_sentence
from hrpo_patches.commands.train_flags import own_names
from hrpo_patches.files import missing
from hrpo_patches.models.base import read_config
from hrpo_patches.models.hub import adapter_folder
from hrpo_patches.monitor.report import read_run
from hrpo_patches.tasks.sources import rows_of
from hrpo_thinking.errors import InputError

OWN = own_names()
SAMPLE = [  # read by a trainer of TRL's, an optimizer, a scheduler, the first step's loss, and a package
    ("gradient_accumulation_steps", "0"),
    ("adam_beta1", "2"),
    ("optim_args", "nonsense"),
    ("lr_scheduler_kwargs", '{"nonsense": 1}'),
    ("loss_type", "nonsense"),
    ("use_liger_kernel", "true"),
    ("accelerator_config", "nojson"),
    ("generation_kwargs", "nojson"),
    ("num_generations", "0"),
    ("seed", "-1"),
    ("report_to", "none trackio"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return base_run(folder), folder / "run"


@pytest.mark.parametrize(("name", "value"), SAMPLE)
def test_a_wrong_value_is_a_sentence_that_names_its_flag(run, name, value):
    words = value.split() if name == "report_to" else [value]
    result, text = tried(*run, name, *words, "--disable_tqdm", "true")
    assert result == "refused" and f"--{name}" in text.replace("error: ", "error: --"), text
    assert "disable_tqdm" not in text or name == "optim_args", text  # whose message says neither name nor value


def test_the_script_tries_every_flag():
    flags = {name for name, _ in cases()}
    assert len(flags) > 190 and {"top_p", "report_to", "bptt", "deepspeed", "push_to_hub"} <= flags


def test_a_bug_of_ours_or_of_a_later_step_keeps_its_trace():
    with pytest.raises(ValueError, match="ours"), in_a_sentence(["--lr", "1"], OWN):
        raise ValueError("ours")
    with pytest.raises(ImportError), in_a_sentence(["--lr", "1"], OWN, lambda: False):
        raise ImportError("at step 100")


def test_a_message_is_about_the_flag_whose_name_or_value_is_a_word_of_it():
    ours, others = ["--lr", "1e-5", "--max_steps", "2", "--loss_type=nonsense"], ["--optim_args", "x"]
    assert flags_in("Unknown loss type: nonsense.", [*ours, *others], OWN) == ["--loss_type nonsense"]
    assert flags_in("parallel_mode is already set to True", ["--lr", "1e-5"], OWN) == []
    assert flags_in("too many values (expected 2)", [*ours, *others], OWN) == ["--optim_args x"]
    assert flags_in("too many values (expected 2)", ours, OWN) == ["--max_steps 2"]


def test_a_mistyped_flag_gets_the_nearest_one(run, capsys):
    assert tried(*run, "lora_rnk", "4")[1] == "error: unknown flag --lora_rnk; did you mean --lora_rank?"
    with pytest.raises(InputError, match="unknown flag --modle; did you mean --model"):
        parse_eval(["--modle", "x"])
    parser = plain_parser("hrpo x", "")
    parser.add_argument("--prompt", required=True)
    for mistyped in (["--promt", "x"], ["--promt=x"], ["-prompt", "x"]):
        with pytest.raises(InputError, match="did you mean --prompt"):
            parser.parse_args(mistyped)
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_mistyped_path_gets_the_nearest_one_and_no_talk_of_connections(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sums").mkdir()
    (tmp_path / "runs" / "sums.jsonl").touch()
    (tmp_path / "sums.jsonl").touch()
    (tmp_path / "Qwen" / "Qwen2.5-0.5B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "did you mean Qwen/Qwen2.5-0.5B" in missing("Qwen/Qwen2.5-1.5B", "model")  # the hub cannot be asked
    (tmp_path / "hub" / "models--Qwen--Qwen2.5-7B").mkdir(parents=True)
    assert missing("Qwen/Qwen2.5-7B", "model") is None  # a hub id beside a folder of its owner's
    assert missing("Owner/Name", "model") is None and missing("gpt2", "model") is None  # which only the hub can know
    assert "did you mean sums.jsonl?" in missing("sum.jsonl") and missing("sum.jsonl", "model") is None
    assert "cannot be read" in missing("~nosuchuser/x") and "cannot be read" in missing("./" + "x" * 300)
    for read, name in (
        (read_config, "runs/sum"),
        (adapter_folder, "runs/sum"),
        (lambda name: list(rows_of(name, "train")), "runs/sms.jsonl"),
        (lambda name: read_run(Path(name)), "runs/sum"),
        (lambda name: with_config(["--config", name]), "runs/sum.jsonl"),
    ):
        with pytest.raises(InputError, match=r"does not exist; did you mean .*sums"):
            read(str(tmp_path / name))
    with pytest.raises(InputError, match=r"nowhere/model does not exist\.$"):
        read_config("./nowhere/model")
    with pytest.raises(InputError, match="the model smolm2-135m does not exist; did you mean smollm2-135m"):
        read_config("smolm2-135m")
