"""`hrpo doctor` finds planted faults, each with what to do; a healthy machine is said to be healthy."""

import json
import re
import shutil
import time

import pytest
import torch
from runs import small_trainer
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from hrpo_patches.commands.main import main as cli
from hrpo_patches.evaluation import doctor
from hrpo_patches.evaluation.doctor import Examination
from hrpo_patches.patching import overlay

ROWS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A base, an adapter trained on it, and problems; nobody changes them."""
    folder = tmp_path_factory.mktemp("doctor")
    model = tiny_model("llama", thinking=False)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    trainer = small_trainer(folder / "adapter", model=str(folder / "base"))
    trainer.train()
    trainer.save_model()
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(kept, tmp_path / "patient")


def examined(folder, name="base", engine="auto", task=None):
    """What is wrong: {what: says}."""
    given = (
        str(folder / name),
        None if name == "base" else str(folder / "base"),
        task,
        str(folder / "problems.jsonl"),
    )
    findings = list(Examination(*given, engine))
    assert [finding.what for finding in findings][:4] == ["versions", "patches", "machine", "model"]
    return {finding.what: finding.says for finding in findings if finding.fine is False}


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_healthy_model_is_said_to_be_healthy_within_half_a_minute(kept, capsys, name):
    base = ["--base", str(kept / "base")] if name == "adapter" else []
    started = time.monotonic()
    assert cli(["doctor", str(kept / name), *base, "--dataset", str(kept / "problems.jsonl")]) == 0
    assert time.monotonic() - started < 30
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("Healthy.") and "BAD" not in said
    assert ("never trained to think" in said) == (name == "base")
    assert "6 problems of gsm8k, gold answers right" in said and "thinking_projection" in said
    assert "a step of hrpo train with its defaults takes about" in said
    assert "continuous (not vllm: " in said and "says what generate says" in said


def test_json_says_the_same_and_a_machine_alone_can_be_looked_at(capsys):
    assert cli(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    fine = {finding["what"]: finding["fine"] for finding in found["findings"]}
    assert found["healthy"] and fine["versions"] and fine["patches"] and fine["machine"] and fine["model"] is None


def of_no_family(folder, monkeypatch):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder / "base")


def of_weights_that_are_no_numbers(folder, monkeypatch):
    weights = load_file(folder / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})


def of_another_tokenizer(folder, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(64)])
    tokenizer.save_pretrained(folder / "base")


def of_no_end(folder, monkeypatch):
    for file in ("config.json", "generation_config.json"):
        content = json.loads((folder / "base" / file).read_text())
        (folder / "base" / file).write_text(json.dumps(content | {"eos_token_id": None}))
    content = json.loads((folder / "base" / "tokenizer_config.json").read_text())
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": None}))


def of_a_row_that_is_cut(folder, monkeypatch):
    (folder / "problems.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"question": "')


def of_a_gold_answer_that_is_no_number(folder, monkeypatch):
    (folder / "problems.jsonl").write_text(json.dumps(ROWS[0] | {"answer": "#### many"}))


def of_an_old_version(folder, monkeypatch):
    named = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.2.0" if name == "trl" else named(name))


def of_a_diff_that_does_not_fit(folder, monkeypatch):
    patch = next(patch for patch in overlay.all_patches() if patch.package == "transformers")
    old = patch._replace(target="transformers/models/gpt2/modeling_gpt2.py")
    monkeypatch.setattr(overlay, "all_patches", lambda: (old,))


def of_a_full_disk(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, (1 << 40) - 5, 5))


def of_a_replay_that_forgets(folder, monkeypatch):
    from hrpo_patches.thinking import replay

    forward = replay.replay_forward

    def forgetful(model, input_ids, **given):
        return forward(model, input_ids, **given | {"thinking_mask": torch.zeros_like(given["thinking_mask"])})

    monkeypatch.setattr(replay, "replay_forward", forgetful)


def of_a_gradient_that_is_cut(folder, monkeypatch):
    from hrpo_thinking.blend import Blend

    residual = Blend.projected_residual
    monkeypatch.setattr(Blend, "projected_residual", lambda self, states: residual(self, states).detach())


def of_an_engine_that_says_something_else(folder, monkeypatch):
    from hrpo_patches.engines.continuous import Completions, ContinuousEngine

    complete = ContinuousEngine.complete
    monkeypatch.setattr(
        ContinuousEngine, "complete", lambda *args: Completions([row[1:] for row in complete(*args).tokens])
    )


@pytest.mark.parametrize(
    ("fault", "what", "says"),
    [
        (of_no_family, "model", "is a gpt2 model; hrpo_patches has patches for Llama, .* only"),
        (of_weights_that_are_no_numbers, "model", "up_proj.weight .* is not finite; train it again"),
        (of_another_tokenizer, "tokenizer", "332 tokens and the model embeds 268.* take the model's own tokenizer"),
        (of_no_end, "tokenizer", "has an end token, .*; set eos_token_id in the model's generation_config.json"),
        (of_a_row_that_is_cut, "data", "line 2"),
        (of_a_gold_answer_that_is_no_number, "data", "'many', which is not one number"),
        (of_an_old_version, "versions", "trl is 1.2.0: pip install 'trl<2,>=1.15'"),
        (of_a_diff_that_does_not_fit, "patches", "hrpo_patches cannot patch transformers"),
        (of_a_full_disk, "machine", "less than 1 GiB .* are free; make room"),
        (of_a_replay_that_forgets, "replay", "log-probabilities of rollout and replay differ by"),
        (of_a_gradient_that_is_cut, "gradient", "the gradient of thinking_projection is 0"),
        (of_an_engine_that_says_something_else, "engine", "where generate says .*; use --engine generate"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_found_alone_and_what_to_do_is_said(folder, monkeypatch, fault, what, says):
    assert examined(folder) == {}
    fault(folder, monkeypatch)
    found = examined(folder)
    assert list(found) == [what] and re.search(says, found[what]), found


def test_a_damaged_adapter_and_an_engine_that_is_not_there_are_found_too(folder):
    assert "vLLM is not installed; pip install" in examined(folder, "adapter", engine="vllm")["engine"]
    assert "must be one of generate, continuous, vllm, auto" in examined(folder, engine="fast")["engine"]
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert list(examined(folder, "adapter")) == ["model"]
    assert cli(["doctor", str(folder / "adapter"), "--base", str(folder / "base")]) == 1


def test_what_a_person_cannot_have_foreseen_is_named_and_asked_to_be_reported(kept, monkeypatch):
    monkeypatch.setattr(Examination, "machine", lambda self: 1 / 0)
    assert examined(kept) == {"machine": "ZeroDivisionError: division by zero. Report it, with --json."}
