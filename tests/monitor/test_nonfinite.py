"""A step that is not finite: it is not taken, what it was computed from is kept, and no checkpoint is touched."""

import json
from types import SimpleNamespace

import pytest
import torch
from runs import small_trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from hrpo_patches import NonFiniteError
from hrpo_patches.commands.main import exit_status
from hrpo_patches.monitor.nonfinite import refuse_nonfinite


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plant(trainer, batch):
    """Make the gradient of the projection NaN in the `batch`-th backward pass."""
    parameter = next(p for n, p in trainer.model.named_parameters() if "projection" in n and p.requires_grad)
    count = iter(range(1, 100))
    parameter.register_hook(lambda gradient: gradient * torch.nan if next(count) == batch else gradient)


@pytest.mark.parametrize(("accumulation", "batch"), [(1, 3), (2, 5), (2, 6)])
def test_the_run_stops_before_the_step_and_can_go_on_from_the_last_checkpoint(accumulation, batch, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = small_trainer(tmp_path, **options)
    plant(trainer, batch)
    after = {}
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: save(*args) or after.update(files(tmp_path / "checkpoint-2"))
    with pytest.raises(NonFiniteError, match="the gradient of step 3 is not finite.*resume from the last checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 2 and all(p.isfinite().all() for p in trainer.model.parameters())
    assert after and files(tmp_path / "checkpoint-2") == after
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]

    kept = load_file(tmp_path / "nonfinite-step-3" / "inputs.safetensors")
    assert {"input_ids", "attention_mask", "thinking_states", "thinking_mask"} <= kept.keys()
    assert len(kept["input_ids"]) == 8 and kept["thinking_states"].shape[::2] == (8, 32)
    record = json.loads((tmp_path / "nonfinite-step-3" / "nonfinite.json").read_text())
    assert record["step"] == 3 and record["weights"] == [] and record["inputs"] == []
    if batch == 5:  # a batch of several, of which only the last is clipped
        (name,) = record["gradients"]
        assert "thinking_projection" in name
    else:
        assert record["gradients"].startswith("all: clipping spreads")
    last = json.loads((tmp_path / "monitor.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and "is not finite" in last["stopped"]

    again = small_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4 and again.state.log_history[-1]["step"] == 4


def test_plain_grpo_is_stopped_as_well(tmp_path):
    trainer = small_trainer(tmp_path, residual="none", max_steps=2)
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g * torch.inf)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert "input_ids" in load_file(tmp_path / "nonfinite-step-1" / "inputs.safetensors")


def test_what_was_kept_before_is_not_overwritten(tmp_path):
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), torch.nan)
    for rank, name in ((0, "nonfinite-step-7"), (0, "nonfinite-step-7-2"), (3, "nonfinite-step-7-rank-3")):
        with pytest.raises(NonFiniteError, match=f"{name}. Lower"):
            refuse_nonfinite(layer, {"input_ids": torch.ones(1, 1), "use_cache": False}, tmp_path, 7, rank)
        assert (tmp_path / name / "inputs.safetensors").is_file()


def test_finite_and_missing_gradients_pass(tmp_path):
    layer = torch.nn.Linear(2, 2)
    refuse_nonfinite(layer, {}, tmp_path, 1)
    layer.weight.grad = torch.full((2, 2), 1e15)
    refuse_nonfinite(layer, {}, tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_float16_is_left_to_its_scaler_which_passes_over_steps_that_overflow(tmp_path):
    monitor = small_trainer(tmp_path).monitor
    parameter = next(p for p in monitor.model.parameters() if p.requires_grad)
    parameter.grad = torch.full_like(parameter, torch.inf)
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    monitor._refuse_nonfinite(SimpleNamespace(fp16=True, process_index=0), state)
    with pytest.raises(NonFiniteError):
        monitor._refuse_nonfinite(SimpleNamespace(fp16=False, process_index=0), state)


def test_a_script_says_it_in_a_sentence(capsys):
    def main(argv):
        raise NonFiniteError("a gradient of step 3 is not finite")

    assert exit_status(main, []) == 2
    assert capsys.readouterr().err == "error: a gradient of step 3 is not finite\n"


@pytest.mark.parametrize("rate", [1e30, 1.0])
def test_weights_that_a_step_spoils_are_never_saved(tmp_path, rate):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if rate == 1.0 and state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).data[0] = torch.nan

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": rate}
    trainer = small_trainer(tmp_path, **options, max_grad_norm=0.0)
    trainer.add_callback(Spoil())
    with pytest.raises(NonFiniteError, match="step [12] left weights that are not finite|step 2's rollout|gradient"):
        trainer.train()
    for folder in tmp_path.glob("checkpoint-*"):
        weights = load_file(folder / "adapter_model.safetensors").values()
        assert all(weight.isfinite().all() for weight in weights)
    if rate == 1.0:
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
        record = json.loads((tmp_path / "nonfinite-step-2" / "nonfinite.json").read_text())
        assert len(record["weights"]) == 1
        assert "thinking_states" in load_file(tmp_path / "nonfinite-step-2" / "inputs.safetensors")


def test_a_rollout_whose_logits_are_not_finite_is_a_sentence_and_keeps_its_prompts(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.model.get_base_model().lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits of step 1's rollout are not finite"):
        trainer.train()
    assert "input_ids" in load_file(tmp_path / "nonfinite-step-1" / "inputs.safetensors")
