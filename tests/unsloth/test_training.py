"""One optimizer step of the training script through unsloth, beside the same command line through transformers."""

import contextlib
import io
from importlib.metadata import version
import json
import runpy
from types import SimpleNamespace

import pytest
import torch
import trl
from harness import ON_GPU
from peft import LoraConfig
from programs import ROOT, TARGETS, odd_reward, python
from rollouts import completions, ragged, real_tokens, sample
from safetensors.torch import load_file
from trl.trainer import utils as trl_utils
from unsloth.models.rl import PatchFastRL

import hrpo_patches.models.backends
import hrpo_patches.commands.train
from hrpo_patches.training import logprobs
from hrpo_patches import HRPOConfig, HRPOTrainer, InputError, load_adapter

SCRIPT = ROOT / "scripts" / "hrpo_gsm8k.py"
STEP = {
    "prompt": "plain",
    "examples": "2+3?\n5 #### 5",
    "max_steps": 1,
    "warmup_ratio": 0,
    "group_size": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_prompt_length": 100,
    "max_completion_length": 8,
    "lora_rank": 4,
    "lr": 1e-3,
    "beta": 0.5,
    "max_grad_norm": 1,
    "eval_problems": 1,
    "temperature": 1,
    "residual_r_min": 0.3,
    "residual_r_max": 0.6,
}
WITH_ODD_REWARD = """
import hrpo_patches.commands.train, runpy, sys
from programs import odd_reward
hrpo_patches.commands.train.answer_reward = lambda task, marker: odd_reward
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""
GREEDY_ON_TRANSFORMERS = """
import hrpo_patches, sys, torch
from transformers import AutoModelForCausalLM
from rollouts import ragged, sample
from safetensors.torch import save_file
from tiny import byte_tokenizer
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], thinking={})
model = hrpo_patches.load_adapter(base, sys.argv[2])
tokenizer = byte_tokenizer()
inputs = ragged(tokenizer)
out = sample(model, tokenizer, inputs, do_sample=False, temperature=None, top_k=None, biased=False)
tokens = out.sequences[:, inputs["input_ids"].shape[1] :].contiguous()
save_file({"tokens": tokens, "mask": out.thinking_mask}, sys.argv[3])
"""


def arguments(backend, residual, checkpoints, folder):
    options = STEP | {
        "backend": backend,
        "residual": residual,
        "model_name": checkpoints / "plain-llama",
        "dataset": folder / "sums.jsonl",
        "output_dir": folder / backend,
    }
    options |= {"bptt": 0} if backend == "transformers" else {}  # which is unsloth's default
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module", params=["projection", "embedding", "none"])
def runs(request, checkpoints, tmp_path_factory):
    """(folder with a run of each backend, the unsloth run's trainer, what it printed, the residual)."""
    if not ON_GPU and trl.GRPOTrainer.__name__ == "GRPOTrainer":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UNSLOTH_ALLOW_CPU", "0")
            PatchFastRL()  # as on a GPU: TRL's trainers are now unsloth's
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"{a}+{b}?", "answer": f"#### {a + b}"} for a in range(1, 5) for b in range(1, 5)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainers, printed, make_trainer = [], io.StringIO(), hrpo_patches.commands.train.make_trainer

    def keep(options):
        made = make_trainer(options)
        trainers.append(made[0])
        return made

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(hrpo_patches.models.backends, "_said", [])
        patch.setattr(hrpo_patches.commands.train, "make_trainer", keep)
        patch.setattr(hrpo_patches.commands.train, "answer_reward", lambda task, marker: odd_reward)
        patch.setattr(logprobs, "LOGITS", 2000)  # the loss makes its logits in pieces, the other backend's at once
        runpy.run_path(str(SCRIPT))["main"](arguments("unsloth", request.param, checkpoints, folder))
    python("-c", WITH_ODD_REWARD, SCRIPT, *arguments("transformers", request.param, checkpoints, folder))
    return folder, trainers[0], printed.getvalue(), request.param


def adapter(runs, backend):
    return load_file(runs[0] / backend / "adapter_model.safetensors")


def test_everything_that_is_trained_has_changed_and_the_base_has_not(runs, checkpoints):
    _, trainer, printed, residual = runs
    assert f"backend: unsloth {version('unsloth')} (asked for)" in printed
    assert type(trainer) is HRPOTrainer and trainer.state.global_step == 1
    assert trainer.model.get_base_model().model.gradient_checkpointing  # evaluating before has not switched it off
    base = load_file(checkpoints / "plain-llama" / "model.safetensors")
    kept = trained = 0
    for name, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in base:
            assert torch.equal(parameter.cpu(), base[plain]) and not parameter.requires_grad, name
            kept += 1
        elif ".modules_to_save." in name:
            original = trainer.model.get_parameter(name.replace("modules_to_save.default", "original_module"))
            assert not torch.equal(parameter, original) and not original.requires_grad, name
            trained += 1
        elif "lora_B.default" in name:
            assert parameter.abs().max() > 0, name
            trained += 1
    thinking = {"projection": 6, "embedding": 5, "none": 0}[residual]
    assert kept == len(base) and trained == thinking + 2 * len(TARGETS)


def test_both_backends_write_the_same_adapter_and_the_same_log(runs):
    ours, theirs = (adapter(runs, backend) for backend in ("unsloth", "transformers"))
    assert ours.keys() == theirs.keys() and len(ours) >= 2 * 2 * len(TARGETS)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == torch.float32
        # AdamW's first step is g / (|g| + 1e-8): where g is nearly 0 its rounding shows, so the whole is compared.
        assert (ours[name] - value).norm() <= 1e-2 * value.norm(), name
    first, second = (
        json.loads((runs[0] / b / "report.json").read_text())["log"][0] for b in ("unsloth", "transformers")
    )
    assert first.keys() == second.keys() and first["grad_norm"] > 0 and first["reward_std"] > 0
    for key in set(first) - {"step_time"}:
        assert first[key] == pytest.approx(second[key], rel=1e-3, abs=1e-6), key
    if runs[3] != "none":
        assert 0.5 < first["embeds_ratio"] < 0.9 and ("projection/grad_norm" in first) == (runs[3] == "projection")


def test_the_adapter_gives_the_same_greedy_completions_on_both_backends(runs, checkpoints, load, tokenizer, tmp_path):
    folder, residual = runs[0] / "unsloth", runs[3]
    if residual == "none":
        assert not (folder / "thinking_config.json").exists()
        return
    python("-c", GREEDY_ON_TRANSFORMERS, checkpoints / "plain-llama", folder, tmp_path / "out")
    theirs = load_file(tmp_path / "out")
    model = load_adapter(load("plain-llama", torch.float32, thinking={}), folder)
    inputs = ragged(tokenizer).to(model.device)
    out = sample(model, tokenizer, inputs, do_sample=False, temperature=None, top_k=None, biased=False)
    real = real_tokens(model, theirs["tokens"])
    assert real.sum() > 40 and theirs["mask"].any()
    assert torch.equal(completions(out, inputs)[real], theirs["tokens"][real])
    assert torch.equal(out.thinking_mask, theirs["mask"]) and out.thinking_residual == residual


def test_trls_fused_head_is_left_alone_on_a_gpu_too(runs, monkeypatch):
    trainer = runs[1]
    on_gpu = SimpleNamespace(device=torch.device("cuda"), unwrap_model=lambda model: model)
    monkeypatch.setattr(trainer, "accelerator", on_gpu)
    assert trl_utils._ChunkedLogProbFunction is not None
    assert not trainer._has_fused_head(trainer.model)
    assert trainer._has_fused_head(torch.nn.Linear(1, 1))  # any other model's


def test_an_adapter_that_unsloth_did_not_make_is_refused(load, tokenizer, tmp_path):
    with pytest.raises(InputError, match="remove peft_config, and wrap the model with FastLanguageModel"):
        HRPOTrainer(
            load("plain-llama", torch.float32, thinking={}),
            lambda completions, **_: [0.0] * len(completions),
            HRPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=not ON_GPU),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4),
        )
