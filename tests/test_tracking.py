"""The experiment on language: the tokens that it leaves a model, and one run of it from end to end."""

import json
import runpy
import sys
from pathlib import Path

import processes
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.smollm2
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tracking.py"
QUESTION = (
    "At the start, Bob has the ball, Alice has the book.\n1. Bob and Alice swap.\nAlice has the ball after move 1."
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("tracking")


def test_a_model_with_fewer_tokens_reads_the_same_words_and_computes_the_same_logits(smollm2, out):
    folder = runpy.run_path(str(SCRIPT))["base_of"](out, 2)
    small, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model, before = smollm2
    ids, rows = tokenizer(QUESTION)["input_ids"], before(QUESTION)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == before.convert_ids_to_tokens(rows)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (before.eos_token_id, before.pad_token_id)
    assert len(tokenizer) == small.config.vocab_size < 600
    names = before.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    with torch.no_grad():
        logits = small(torch.tensor([ids])).logits
        hidden = model.model(torch.tensor([rows]), output_hidden_states=True).hidden_states[2]  # after two layers
        expected = model.lm_head(model.model.norm(hidden))[..., names]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_arms_are_trained_from_one_start_read_out_drawn_and_not_run_twice(smollm2, out, monkeypatch):
    commands = []

    def forked(command, **_):
        commands.append(command[3])
        done = processes.run(processes.module, *command[1:])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr("subprocess.run", forked)
    flags = "--layers 2 --moves 2 --start_steps 1 --steps 1 --batch 2 --problems 16 --tested 2 --advance once --test 2"
    words = ["tracking.py", str(out), *flags.split(), "--arms", "exact", "fillers", "written"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"of problems with 2 moves right .* expected 0.9. Raise --start_steps"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    monkeypatch.setattr(sys, "argv", [*words, "--start_accuracy", "0"])
    for _ in range(2):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert commands == ["sft", "eval", "sft", "eval", "sft", "eval"]
    assert (out / "tracking.png").stat().st_size > 1000
    found = json.loads((out / "tracking.json").read_text())
    assert [len(found[f"0 {arm} 2"]) for arm in ("exact", "fillers", "written")] == [6, 1, 1]
    assert "partner's answer" in (out / "tracking.md").read_text()
