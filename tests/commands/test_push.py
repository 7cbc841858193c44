"""`hrpo push` lists what it would push, and refuses what cannot be loaded again; test_hub.py tries it on a hub."""

import json
import re
import shutil

import pytest
from runs import small_trainer
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.commands.main import main, train
from hrpo_patches.models.card import CARD, PAPER
from hrpo_patches.models.hub import CONFIG
from hrpo_patches.models.push import files_of
from hrpo_patches.training import shared
from hrpo_thinking.errors import InputError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two saved runs, of an adapter that thinks and of one that does not, and the base that both name."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama", thinking=None).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for name, residual in (("run", "projection"), ("plain", None)):
        options = {"residual": residual, "save_strategy": "steps", "save_steps": 1}
        trainer = small_trainer(folder / name, model=str(folder / "base"), **options)
        trainer.train()
        trainer.save_model()
    return folder


def without(*names):
    def damage(run):
        for name in names:
            (run / name).unlink()

    return damage


def unfinished(run):
    for path in run.iterdir():
        if path.is_file() and not path.name.startswith("monitor"):
            path.unlink()


def cut_short(run):
    content = (run / WEIGHTS).read_bytes()
    (run / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_a_gate(run):
    weights = load_file(run / WEIGHTS)
    save_file({name: value for name, value in weights.items() if "gate_i" not in name}, run / WEIGHTS)


def a_note_with_its_path(run):
    (run / CARD).write_text(f"{(run / CARD).read_text()}\nThe data is in {run.parent}/run/data.\n")


def a_note_that_ends_with_it(run):
    (run / CARD).write_text(f"{(run / CARD).read_text()}\nSee {run}.\n")


def a_damaged_report(run):
    (run / "report.json").write_text("[")


def a_shard_is_lost(run):
    without(CONFIG, WEIGHTS)(run)
    (run / "config.json").write_text(json.dumps({"thinking": {"residual": "projection"}}))
    save_file({}, run / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))


def stock(run):
    shutil.rmtree(run)
    shutil.copytree(run.parent / "base", run)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (shutil.rmtree, "does not exist"),
        (unfinished, "is a run that has not finished. Resume it, or push its last checkpoint, "),
        (lambda run: (unfinished(run), shutil.rmtree(run / "checkpoint-1")), "holds neither an adapter"),
        (cut_short, "holds a file that is damaged"),
        (without_a_gate, "lacks thinking_residual_gate_i"),
        (without("thinking_config.json"), "does not say how it thinks; hrpo convert"),
        (a_shard_is_lost, "lacks model-00002-of-00002.safetensors"),
        (stock, "holds a full model that was not trained to think"),
        (a_note_with_its_path, "README.md names "),
        (a_note_that_ends_with_it, "README.md names "),
        (a_damaged_report, "report.json is damaged"),
    ],
)
def test_a_folder_that_could_not_be_loaded_or_names_a_path_is_refused(saved, tmp_path, capsys, damage, text):
    for name in ("base", "run"):
        shutil.copytree(saved / name, tmp_path / name)
    damage(tmp_path / "run")
    assert main(["push", str(tmp_path / "run"), "someone/run", "--base", "someone/base"]) == 2
    assert text in capsys.readouterr().err


def test_the_card_names_the_base_that_it_is_pushed_with_and_longer_names_are_no_paths(saved, tmp_path):
    run = shutil.copytree(saved / "run", tmp_path / "run")
    card = bytes(files_of(run, "someone/run", "someone/base")[CARD]).decode()
    (run / CARD).write_text(f"{card}\nSee https://example.org{run}/page and {run}ning.\n")
    pushed = bytes(files_of(run, "someone/run", "other/model")[CARD]).decode()
    assert 'load_adapter("other/model"' in pushed and "someone/base" not in pushed


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["someone/run"], "is not a hub id, so nobody else can load it. Name the same model on the hub (--base"),
        (["someone/run", "--base", "./base"], "must be named by its hub id, owner/name, not './base'"),
        (["run", "--base", "someone/base"], "expected owner/name, got 'run'"),
        (["some one/run", "--base", "someone/base"], "'some one/run' is not a name for the hub"),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_refused(saved, capsys, flags, text):
    assert main(["push", str(saved / "run"), *flags]) == 2
    assert text in capsys.readouterr().err


def test_the_files_are_listed_before_the_hub_is_asked(saved, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert main(["push", str(saved / "run"), "someone/run", "--base", "someone/base"]) == 2
    shown = capsys.readouterr()
    assert "adapter_model.safetensors" in shown.out and "0.022 MB" in shown.out
    assert "training_args" not in shown.out and "monitor" not in shown.out
    assert "error: pushing to someone/run failed: " in shown.err and "offline" in shown.err


@pytest.mark.parametrize("name", ["run", "plain"])
def test_a_checkpoint_is_pushed_as_the_finished_run_is_with_a_card_of_ours(saved, name):
    folders = (saved / name, saved / name / "checkpoint-1")
    run, checkpoint = (files_of(folder, "someone/run", "someone/base") for folder in folders)
    assert run.keys() == checkpoint.keys() and json.loads(run[CONFIG])["base_model_name_or_path"] == "someone/base"
    for files in (run, checkpoint):
        text = files[CARD].decode()
        assert PAPER in text and '"someone/run"' in text and "base_model: someone/base" in text
        assert ("hrpo_patches.load_adapter(" in text) == (name == "run") and "DeepSeek" not in text
        assert "None" not in text and str(saved) not in text


def test_a_report_is_pushed_with_its_prompt_and_without_paths(saved, tmp_path):
    shutil.copytree(saved / "run", tmp_path / "run")
    arguments = {"output_dir": "out", "dataset": "data/x.jsonl", "task": "gsm8k", "examples": ["C:\\x"], "seed": 1}
    report = {"title": "data/x.jsonl", "prompt": "{q}/", "arguments": arguments, "after": {"mean": 1.0}}
    report["after"] |= {"standard_error": 0.0, "total": 2}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    pushed = json.loads(files_of(tmp_path / "run", "someone/run", "someone/base")["report.json"])
    assert pushed.pop("arguments") == {"task": "gsm8k", "seed": 1}
    assert pushed == {"prompt": "{q}/", "after": report["after"]}


def test_a_report_is_pushed_with_what_is_known_of_it_alone(saved, tmp_path):
    shutil.copytree(saved / "run", tmp_path / "run")
    report = {"arguments": {"seed": 1}, "seconds": 1.0, "log": [], "notes": "secret", "environment": {"USER": "me"}}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    pushed = json.loads(files_of(tmp_path / "run", "someone/run", "someone/base")["report.json"])
    assert pushed.keys() == {"arguments", "seconds", "log"}


@pytest.mark.parametrize("card", [True, False], ids=["named in our card", "beside the run"])
def test_a_base_in_a_relative_folder_is_refused_from_any_working_directory(saved, tmp_path, monkeypatch, card):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    run = shutil.copytree(saved / "run", project / "runs" / "run")
    (run / CONFIG).write_text(
        json.dumps(json.loads((run / CONFIG).read_text()) | {"base_model_name_or_path": "our/base"})
    )
    if not card:  # what the trainer wrote says that the base was a folder
        (run / CARD).unlink()
        shutil.copytree(saved / "base", project / "our" / "base")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match="was trained on 'our/base', which is not a hub id"):
        files_of(run, "someone/run")
    assert json.loads(files_of(run, "someone/run", "our/base")[CONFIG])["base_model_name_or_path"] == "our/base"


@pytest.mark.parametrize("head", ["", "---\nlicense: mit\n---\n"], ids=["text alone", "with metadata"])
def test_a_card_that_a_user_wrote_is_pushed_with_its_text_and_the_base(saved, tmp_path, head):
    run = shutil.copytree(saved / "run", tmp_path / "run")
    text = "# My model\n\nBase of it all: see THE_BASE_MODEL.\n"
    (run / CARD).write_text(head + text)
    pushed = bytes(files_of(run, "someone/run", "someone/base")[CARD]).decode()
    assert pushed.endswith(text) and "base_model: someone/base\n" in pushed
    assert ("license: mit" in pushed) == bool(head)
    assert (run / CARD).read_text() == head + text


def test_shards_that_are_not_loaded_are_not_pushed(saved, tmp_path):
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    old = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    save_file({}, model / "model-00001-of-00002.safetensors")
    assert not old & files_of(model, "someone/model").keys()
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {
        "weight_map": dict.fromkeys(
            load_file(model / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"
        )
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    pushed = {name for name in files_of(model, "someone/model") if name.startswith("model")}
    assert pushed == {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="holds neither an adapter"):
        files_of(model, "someone/model")


def test_a_run_that_its_trainer_refuses_leaves_no_repository(tmp_path, monkeypatch):
    created = []
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(shared, "open_repository", lambda api, name, private: created.append(name) or name)
    options = {"push_to_hub": True, "hub_model_id": "someone/run"}
    model = tiny_model("llama")
    model.config._name_or_path = "someone/base"
    with pytest.raises(InputError, match="thoughts=10 must be smaller"):
        small_trainer(tmp_path / "run", model=model, thoughts=10, **options)
    assert not created
    model = tiny_model("llama")
    model.config._name_or_path = "someone/base"
    trainer = small_trainer(tmp_path / "run", model=model, **options)
    assert created == [trainer.hub_model_id] == ["someone/run"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--hub_model_id", "someone/run"], "--hub_model_id requires --push_to_hub true"),
        (["--push_to_hub", "true", "--hub_strategy", "checkpoint"], "hub_strategy=checkpoint pushes the optimizer's"),
        (["--push_to_hub", "true", "--model_name", "./base"], "push_to_hub pushes an adapter of './base', which is"),
        (["--push_to_hub", "true", "--hub_model_id", "a/b/c"], "'a/b/c' is not a name for the hub"),
    ],
)
def test_a_run_that_could_not_be_pushed_is_refused_before_any_work(tmp_path, monkeypatch, flags, text):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with pytest.raises(InputError, match=re.escape(text)):
        train(["--model_name", "someone/base", "--output_dir", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()
