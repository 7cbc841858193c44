"""A small HRPOTrainer on a tiny model; shared by several tests."""

import json
import runpy
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model

from hrpo_patches import HRPOConfig, HRPOTrainer
from hrpo_patches.commands import train_flags
from hrpo_patches.commands.flags import split_backend, with_config
from hrpo_thinking.parts import MODULES

SCRIPTS = Path(__file__).parents[1] / "scripts"
PROMPTS = ["Hi", "What is 3 + 4?", "Say #### once", "abc"]


def lengths_differ(completions, **_):
    """A reward that varies within every group."""
    return [float(sum(map(ord, str(text))) % 7) for text in completions]


DEFAULTS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 10,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "beta": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
}


def parse(argv, task="gsm8k"):
    """What `hrpo train` makes of a command line before any work."""
    backend, words = split_backend(with_config(argv))
    return train_flags.parse(words, task, backend)


def config(folder, **options):
    return HRPOConfig(output_dir=str(folder), **DEFAULTS | options)


def lora(**options):
    """LoRA whose A and B both have a gradient in the first step (B starts at random, not at zero)."""
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def assert_all_thinking_parts_moved(trainer, before):
    """Every thinking part and LoRA differs from `before`, by name; nothing else of the model does."""
    after = dict(trainer.model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    for part in (*MODULES, "lora_A", "lora_B"):
        assert any(f".{part}." in name for name in moved), part
    assert not any("lora_" not in name and ".modules_to_save." not in name for name in moved)


def assert_smollm2_learns_gsm8k(engine, shared_data, folder):
    """Two steps of scripts/hrpo_gsm8k.py on a real model and real problems: all parts learn, the replay is exact."""
    options = {
        "engine": engine,
        "model_name": "smollm2-135m",
        "dataset": shared_data / "gsm8k" / "train.jsonl",
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "group_size": 4,
        "max_prompt_length": 256,
        "max_completion_length": 24,
        "logging_steps": 1,
        "save_steps": 1,
        "eval_problems": 2,
        "learning_rate": 1e-3,
        "lr_thinking_projection": 1e-3,
        "residual_scale": "embedding",
        "r_min": 0.5,
        "r_max": 0.9,
        "format_reward": 0.1,
    }
    main = runpy.run_path(str(SCRIPTS / "hrpo_gsm8k.py"))["main"]
    report = main([f"--{name}={value}" for name, value in options.items()])
    assert report["arguments"]["engine"] == engine and report["before"]["total"] == report["after"]["total"] == 2
    rows = [row for row in map(json.loads, (folder / "monitor.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0.4 < row["embeds_ratio"] < 0.95 and row["projection/grad_norm"] > 0
        assert engine != "vllm" or row["sampling/sampling_logp_difference/max"] < 1e-3
    first, last = (load_file(folder / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    for part in (*MODULES, "lora_A", "lora_B"):
        assert any(f".{part}." in name for name in moved), part
    projection = last["base_model.model.model.thinking_projection.weight"]
    assert projection.shape == (576, 576) and projection.dtype == torch.float32 and projection.isfinite().all()


def run_of_sums(folder, upto, **options):
    """The flags of a small `hrpo train` on sums below `upto`, without its folder; model and data are written here."""
    tiny_model("qwen2", thinking=False).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    rows = [{"question": f"{a}+{b}?", "answer": f"#### {a + b}"} for a in range(upto) for b in range(upto)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"model_name": folder / "base", "dataset": folder / "sums.jsonl", "prompt": "plain", "lora_rank": 4}
    return [str(word) for name, value in (given | options).items() for word in (f"--{name}", value)]


def small_trainer(
    folder, family="llama", model=None, peft_config="lora", reward=lengths_differ, tokenizer=None, **options
):
    if model is None:
        model = tiny_model(family, thinking={"r_min": 0.5, "r_max": 0.9})
    data = Dataset.from_dict({"prompt": PROMPTS * 8})
    return HRPOTrainer(
        model,
        reward,
        config(folder, **options),
        data,
        processing_class=tokenizer or byte_tokenizer(),
        peft_config=lora() if peft_config == "lora" else peft_config,
    )
