"""lm-evaluation-harness with `hrpo`: without thinking it is `hf`; with it, its completions are those that think."""

import json
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from runs import lora, small_trainer
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hrpo_patches import load_adapter
from hrpo_patches.commands.main import main as cli
from hrpo_patches.evaluation.harness import ThinkingLM
from hrpo_patches.models.smollm2 import smollm2_folder
from hrpo_thinking.errors import InputError

GSM8K = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
LOCAL = """
include: {original}
task: gsm8k_local
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    train: {data}
    test: {data}
"""


def results(model, arguments, folder, data, limit, tokens, shots=0):
    (folder / "local.yaml").write_text(LOCAL.format(original=GSM8K, data=data))
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["gsm8k_local"],
        task_manager=TaskManager(include_path=str(folder)),
        num_fewshot=shots,
        limit=limit,
        batch_size=10,
        device="cpu",
        gen_kwargs={"max_gen_toks": tokens},
        bootstrap_iters=0,
    )


def completions(found):
    """By problem: two filters read the same completion, each in a row of its own."""
    return {sample["doc_id"]: sample["resps"] for sample in found["samples"]["gsm8k_local"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter trained on it, and some problems."""
    folder = tmp_path_factory.mktemp("harness")
    model = tiny_model("llama", thinking=False)
    model.config.thinking = None
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"r_min": 0.5, "r_max": 0.9})
    trainer = small_trainer(folder / "adapter", model=model)
    trainer.train()
    trainer.save_model()
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(6)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_an_adapter_thinks_in_the_harness_as_it_does_without(folder, tmp_path):
    arguments = {"pretrained": str(folder / "base"), "peft": str(folder / "adapter")}
    data = folder / "data.jsonl"
    soft = results("hrpo", arguments, tmp_path, data, 4, 12, shots=1)
    hard = results("hrpo", arguments | {"thinking": False}, tmp_path, data, 4, 12, shots=1)
    assert completions(soft) != completions(hard)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    tokenizer = byte_tokenizer()
    for sample in soft["samples"]["gsm8k_local"]:
        prompt = tokenizer(sample["arguments"][0][0], return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False, thinking=True, tokenizer=tokenizer)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"] == [[text]]


def test_forced_thoughts_are_no_text_of_the_harness_and_stop_nothing(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"r_min": 0.5, "r_max": 0.9})
    trainer = small_trainer(tmp_path / "adapter", model=base, thoughts=3, filler=".")
    trainer.train()
    trainer.save_model()
    model = ThinkingLM(pretrained=str(folder / "base"), peft=str(tmp_path / "adapter"), device="cpu")
    tokenizer = byte_tokenizer()
    ids = tokenizer(["Hi"], return_tensors="pt")["input_ids"]
    thought = model.model.generate(
        ids,
        max_new_tokens=11,
        do_sample=False,
        thinking=True,
        tokenizer=tokenizer,
        attention_mask=torch.ones_like(ids),
    )
    assert (thought[0, ids.shape[1] : ids.shape[1] + 3] == tokenizer.get_vocab()["."]).all()
    for stop in (["."], ["QQQ"]):  # a stop that the filler spells
        out = model._model_generate(ids, ids.shape[1] + 8, stop, attention_mask=torch.ones_like(ids))
        assert torch.equal(out[:, ids.shape[1] :], thought[:, ids.shape[1] + 3 :])


def test_what_cannot_think_is_refused(folder, tmp_path):
    base = {"pretrained": str(folder / "base"), "device": "cpu"}
    with pytest.raises(InputError, match="never trained to think, so it would think at random; add thinking=False"):
        ThinkingLM(**base)
    trainer = small_trainer(tmp_path / "plain", residual="none", peft_config=lora())
    trainer.save_model()
    with pytest.raises(InputError, match="it is not a thinking adapter. Evaluate others with --model hf"):
        ThinkingLM(**base, peft=str(tmp_path / "plain"))
    thinking = ThinkingLM(**base, peft=str(folder / "adapter"))
    with pytest.raises(InputError, match="scores given answers, in which nothing is thought; add thinking=False"):
        thinking._loglikelihood_tokens([(("a", "b"), [1], [2])])
    hard = ThinkingLM(**base, thinking=False)
    stock = HFLM(**base)
    request = [(("a", "b"), [1, 5], [2])]
    assert hard._loglikelihood_tokens(request) == stock._loglikelihood_tokens(request)


def test_the_command_is_the_harness_and_has_hrpo_among_its_models(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(["lm_eval", "run", "--help"])
    assert stop.value.code == 0 and "--model" in capsys.readouterr().out
    monkeypatch.setattr("hrpo_patches.extras.find_spec", lambda name: None)
    assert cli(["lm_eval"]) == 2
    assert "pip install 'hrpo_patches[lm-eval]'" in capsys.readouterr().err


@pytest.mark.smollm2
@pytest.mark.shared_data
def test_without_thinking_it_is_the_harness_own_model_on_real_problems(shared_data, tmp_path):
    arguments = {"pretrained": str(smollm2_folder()), "dtype": "float32"}
    data = shared_data / "gsm8k" / "test.jsonl"
    torch.manual_seed(0)
    ours = results("hrpo", arguments | {"thinking": False}, tmp_path, data, 5, 16)
    theirs = results("hf", arguments, tmp_path, data, 5, 16)
    assert len(completions(ours)) == 5 and completions(ours) == completions(theirs)
    assert ours["results"]["gsm8k_local"] == theirs["results"]["gsm8k_local"]
