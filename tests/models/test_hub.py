"""An adapter can be named by its hub id: here one that the hub's cache holds, for there is no network."""

import json
import os
import subprocess
import sys

import pytest
from runs import small_trainer
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.models.hub import adapter_folder, find_adapter
from hrpo_thinking.errors import InputError

HASH = "0" * 40
LOOK = """
import sys, torch
import hrpo_patches
from hrpo_patches.commands.main import main
from transformers import AutoModelForCausalLM

model = hrpo_patches.load_adapter(sys.argv[1], "someone/adapter")
assert model.config.thinking["answer_start"] == "a", model.config.thinking
model = hrpo_patches.load_adapter(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "someone/adapter")
flags = ["--dataset", sys.argv[2] + "/data.jsonl", "--out", sys.argv[2] + "/out.json", "--max_new_tokens", "4"]
assert main(["eval", "--adapter", "someone/adapter", *flags]) == 0
assert main(["think", "someone/adapter", "--prompt", "Hi", "--max_new_tokens", "4"]) == 0
assert main(["merge", "someone/adapter", sys.argv[2] + "/merged"]) == 0
assert main(["merge", "someone/nothing", sys.argv[2] + "/other"]) == 2
"""


@pytest.fixture
def cache(tmp_path):
    """A cache of the hub with someone/adapter, and the folder of its base."""
    base = tmp_path / "base"
    tiny_model("llama", thinking=None).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    trainer = small_trainer(tmp_path / "run", model=str(base), answer_start="a")
    trainer.train()
    repository = tmp_path / "hub" / "models--someone--adapter"
    trainer.save_model(str(repository / "snapshots" / HASH))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HASH)
    return tmp_path / "hub", base


def test_commands_and_load_adapter_take_a_hub_id(cache, tmp_path):
    hub, base = cache
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOOK, str(base), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "someone/nothing holds no adapter" in done.stderr
    assert (tmp_path / "merged" / "config.json").is_file() and (tmp_path / "out.json").is_file()


def test_a_folder_is_itself_and_one_without_an_adapter_is_none(tmp_path, monkeypatch):
    assert find_adapter(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_adapter(tmp_path) == adapter_folder(str(tmp_path)) == tmp_path
    for name in (tmp_path / "nowhere", "a/b/c", ""):
        with pytest.raises(InputError, match="holds no adapter|does not exist"):
            adapter_folder(name)
