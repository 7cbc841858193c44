"""What training and `hrpo push` share on a hub is loaded from there as it was saved; the hub is a stand-in."""

import json

import pytest
from hub import stand_in
from runs import run_of_sums

from hrpo_patches.models.card import PAPER
from hrpo_patches.models.hub import adapter_folder, find_adapter
from hrpo_thinking.errors import InputError

ROUND_TRIP = """
import json, os, sys
from pathlib import Path
import hrpo_patches
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from hrpo_patches.commands.main import main

folder, train, sft = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

def hrpo(*words, status=0):
    assert main([str(word) for word in words]) == status, words

def assert_same(weights, file):
    saved = load_file(file)
    assert weights.keys() == saved.keys() and all(torch.equal(value, saved[name]) for name, value in weights.items())

# Training pushes, and the first of its pushes fails.
hrpo("train", *train, "--output_dir", folder / "run", "--hub_model_id", "someone/run")
hrpo("sft", *sft, "--output_dir", folder / "full", "--hub_model_id", "someone/full", "--hub_strategy", "end")
words = ["--advance", "loss", "--output_dir", folder / "refused", "--hub_model_id", "someone/refused"]
hrpo("sft", *sft, *words, status=2)

# What it pushed is loaded from an empty cache.
held = os.listdir(Path(os.environ["HF_HOME"]) / "hub")
assert "models--someone--base" in held and "models--someone--run" not in held and "models--someone--full" not in held
model = hrpo_patches.load_adapter("someone/base", "someone/run")
assert_same(get_peft_model_state_dict(model), folder / "run" / "adapter_model.safetensors")
assert model.generation_config.thinking and model.config.thinking["answer_start"] == "a"
model = AutoModelForCausalLM.from_pretrained("someone/full")
assert_same(model.state_dict(), folder / "full" / "model.safetensors")
assert model.generation_config.thinking and model.generation_config.thoughts == 1

# The commands take its name.
asked = ["--dataset", folder / "sums.jsonl", "--limit", 2, "--max_new_tokens", 4]
hrpo("eval", "--adapter", "someone/run", *asked, "--out", folder / "eval.json")
hrpo("think", "someone/run", "--prompt", "Hi", "--max_new_tokens", 4)
hrpo("merge", "someone/run", folder / "merged")
hrpo("merge", "someone/nothing", folder / "other", status=2)

# `hrpo push`: a merged model, a branch of its own, and what it refuses.
hrpo("push", folder / "merged", "someone/merged", "--private", "--base", "someone/base")
model = AutoModelForCausalLM.from_pretrained("someone/merged")
assert_same(model.state_dict(), folder / "merged" / "model.safetensors")
assert model.generation_config.thinking
hrpo("push", folder / "merged", "someone/run", status=2)
hrpo("push", folder / "merged", "someone/run", "--overwrite", "--private", status=2)
hrpo("push", folder / "run", "someone/merged", "--revision", "adapter")
hrpo("push", folder / "run", "another/run", status=2)
hrpo("push", folder / "merged", "someone/full", "--overwrite")
del os.environ["HF_TOKEN"]
hrpo("push", folder / "run", "someone/new", status=2)
hrpo("train", *train, "--output_dir", folder / "again", status=2)
"""
REFUSED = (
    "the last of 1 stages begins after ",
    "someone/nothing holds no adapter",
    "someone/run already holds files (README.md, adapter_config.json, ",
    "someone/run exists and is public",
    "pushing to another/run failed: 403 Forbidden: You don't have the rights",
    "no Hugging Face token was found",
)
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "thinking_config.json"}
MODEL = {"config.json", "model.safetensors"}
BOTH = {"README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The hub after the round trip, what was printed, and the folder."""
    folder = tmp_path_factory.mktemp("pushed")
    flags = [*run_of_sums(folder, 4), "--push_to_hub", "true", "--max_completion_length", "8", "--use_cpu", "true"]
    flags[1] = "someone/base"
    solved = [{"question": f"{i}?", "steps": [f"{i}+{i} is {2 * i}"], "answer": str(i)} for i in range(8)]
    (folder / "solved.jsonl").write_text("\n".join(map(json.dumps, solved)))
    train = ["--max_steps", "2", "--save_steps", "1", "--answer_start", "a", "--gradient_accumulation_steps", "1"]
    sft = ["--max_steps", "1", "--dataset", str(folder / "solved.jsonl"), "--lora_rank", "0", "--until", "1"]
    sft += ["--advance", "once", "--max_completion_length", "40"]
    with stand_in() as hub:
        hub.put("someone/base", folder / "base")
        hub.failures = ["/commit/"]
        words = json.dumps([*flags, *train]), json.dumps([*flags, *sft])
        said = hub.run(ROUND_TRIP, folder, *words, cache=folder / "cache")
    return hub, said, folder


def test_what_is_pushed_is_loaded_as_it_was_saved_and_thinks(pushed):
    hub, said, _ = pushed
    messages = hub.repositories["someone/run"].messages
    assert messages == ["initial commit", "Training in progress, step 2", "End of training"]
    assert "pushing to someone/run failed: Server error '503" in said and "Training continues" in said
    assert "Asked as in training, with the instruction of the run" in said
    assert f"pushed: {hub.url}/someone/merged\n" in said and "hrpo think someone/merged" in said
    assert 'load_adapter("someone/base", "merged")' in said and "--revision adapter --local-dir merged" in said


def test_a_push_that_cannot_be_is_refused_in_a_sentence(pushed):
    _, said, _ = pushed
    assert "someone/refused" not in pushed[0].repositories
    for text in REFUSED:
        assert f"error: {text}" in said, text
    assert said.count("no Hugging Face token") == 2 and "Traceback" not in said


def test_a_repository_holds_what_loads_it_no_pickle_and_no_path(pushed):
    hub, _, folder = pushed
    names = {name: set(one.files()) for name, one in hub.repositories.items() if name != "someone/base"}
    assert names["someone/run"] == ADAPTER | BOTH | {"report.json"}
    assert names["someone/merged"] == MODEL | BOTH == names["someone/full"]  # whose report was deleted there
    assert set(hub.repositories["someone/merged"].files("adapter")) == ADAPTER | BOTH | {"report.json"}
    first, full, _ = map(set, hub.repositories["someone/full"].commits.values())
    assert not first and full == MODEL | BOTH | {"report.json"}
    assert hub.repositories["someone/merged"].private and not hub.repositories["someone/run"].private
    for name, one in hub.repositories.items():
        for files in one.commits.values():
            for file, content in files.items():
                assert str(folder).encode() not in content and not file.endswith((".bin", ".pt", ".pth")), (name, file)


def test_each_card_names_the_paper_its_repository_and_its_base(pushed):
    hub, _, _ = pushed
    for name in ("someone/run", "someone/merged", "someone/full"):
        text = hub.repositories[name].files()["README.md"].decode()
        assert PAPER in text and f'"{name}"' in text and "base_model: someone/base" in text
        assert not any(word in text for word in ("None", "DeepSeekMath", "THIS_REPOSITORY", "THE_BASE_MODEL"))


def test_a_folder_is_itself_and_one_without_an_adapter_is_none(tmp_path):
    assert find_adapter(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_adapter(tmp_path) == adapter_folder(str(tmp_path)) == tmp_path
    for name in (tmp_path / "nowhere", "a/b/c", ""):
        with pytest.raises(InputError, match="holds no adapter|does not exist"):
            adapter_folder(name)
