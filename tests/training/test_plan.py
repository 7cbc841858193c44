"""The memory that is planned is what a run takes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import tiny_config
from transformers import LlamaConfig

from hrpo_patches.commands.main import main
from hrpo_patches.models.cost import config_that_thinks
from hrpo_patches.training.plan import Shapes, plan
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError

TESTS = Path(__file__).parents[1]
COMMON = {"gradient_accumulation_steps": 1, "lora_rank": 16, "optim": "adamw_torch"}
PLAIN, FLOAT32 = {"gradient_checkpointing": False}, {"dtype": "float32", "bptt": 0}
SHAPES = [
    Shapes(16, max_prompt_length=160, max_completion_length=32, **PLAIN | COMMON),
    Shapes(16, max_prompt_length=192, max_completion_length=32, bptt=1, **COMMON),
    Shapes(8, max_prompt_length=96, max_completion_length=96, **PLAIN | FLOAT32 | COMMON),
]


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        thinking={},
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shapes", SHAPES, ids=["plain", "checkpointing", "float32"])
def test_the_plan_is_within_fifteen_percent_of_what_a_run_takes(folder, shapes):
    found = plan(config_that_thinks(str(folder), ThinkingConfig()), shapes)
    given = json.dumps({name: value for name, value in asdict(shapes).items() if name != "engine"})
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TESTS / "memory_probe.py", folder, given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert found.peak == pytest.approx(seen["grown"], rel=0.15)


def test_what_is_held_is_counted_by_a_pencil(tmp_path):
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    config = config_that_thinks(str(tmp_path), ThinkingConfig())
    small = Shapes(
        2, 2, max_prompt_length=8, max_completion_length=8, lora_rank=4, dtype="float32", optim="adamw_torch"
    )
    found = plan(config, small)
    size, vocabulary, keys, inner = 32, config.vocab_size, 16, 64
    modules = 3 * size * size + 3 * size  # the projection, two gates with biases, Lambda
    layer = 2 * size * size + 2 * size * keys + 3 * size * inner + 2 * size
    base = 2 * layer + size + vocabulary * size * (1 if config.tie_word_embeddings else 2)
    lora = 2 * 4 * (2 * 2 * size + 2 * (size + keys) + 3 * (size + inner))
    assert found.trained == 4 * (lora + modules)
    assert found.weights == pytest.approx(4 * (base + modules), rel=0.01)  # and tables of the rotation
    assert found.optimizer == 2 * found.trained
    assert plan(config, replace(small, optim="paged_adamw_8bit")).optimizer == found.optimizer // 4
    of_vllm = plan(config, replace(small, engine="vllm"))
    assert of_vllm.engine == found.weights + found.rollout and of_vllm.rollout == 0


def test_the_command_prints_a_plan_and_refuses_its_flags_without_it(tmp_path, capsys):
    tiny_config("qwen2").save_pretrained(tmp_path)
    flags = ["--per_device_train_batch_size", "2", "--max_prompt_length", "8", "--max_completion_length", "8"]
    assert main(["info", str(tmp_path), "--plan", *flags]) == 0
    assert "peak" in capsys.readouterr().out
    assert main(["info", str(tmp_path), *flags]) == 2
    assert "--per_device_train_batch_size is about the memory of training; add --plan." in capsys.readouterr().err
    assert main(["info", str(tmp_path), "--plan", "--lora_rank", "0"]) == 2
    assert "--lora_rank must be at least 1, not 0." in capsys.readouterr().err
    assert main(["info", str(tmp_path), "--plan", "--gradient_checkpointing", "maybe"]) == 2
    assert "'maybe' is neither true nor false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("thinking", "bptt"),
    [({}, 0), ({}, 3), ({"residual": "embedding"}, "exact"), ({"residual_scale": "embedding"}, "exact")],
    ids=str,
)
def test_every_residual_and_depth_that_trains_can_be_planned(tmp_path, family, thinking, bptt):
    tiny_config(family, thinking=None).save_pretrained(tmp_path)
    config = config_that_thinks(str(tmp_path), ThinkingConfig(**thinking))
    small = {"max_prompt_length": 8, "max_completion_length": 8, "lora_rank": 4, "gradient_checkpointing": False}
    found = plan(config, Shapes(2, 1, bptt=bptt, **small))
    assert found.loss > plan(config, Shapes(1, 1, bptt=bptt, **small)).loss > 0 and found.rollout > 0
    assert "embedding_norm" not in config.thinking or config.thinking["embedding_norm"] is None


def test_what_cannot_be_planned_is_refused(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    config = config_that_thinks(str(tmp_path), ThinkingConfig())
    with pytest.raises(InputError, match="bptt=sequential cannot be planned"):
        plan(config, Shapes(bptt="sequential"))
    with pytest.raises(InputError, match="optim must be one of adamw_torch"):
        plan(config, Shapes(optim="foo"))
