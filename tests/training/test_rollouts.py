"""Training on rollouts of continuous batching: a gradient for every part, and exact resuming."""

import pytest
import torch
from runs import assert_all_thinking_parts_moved, small_trainer
from tiny import tiny_model

PACKED = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 128},
}


def run(folder, steps=3, watch=None, **options):
    trainer = small_trainer(folder, max_steps=steps, **PACKED | options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if watch is not None:
        trainer.monitor.backbone.register_forward_hook(watch, with_kwargs=True)
    trainer.train(resume_from_checkpoint=options.pop("resume_from_checkpoint", None))
    return trainer, before


WAYS = [{"bptt": "sequential"}, {"bptt": 0}, {"thoughts": 2}, {"reference": "start"}]


@pytest.mark.parametrize(
    ("family", "steps", "options"),
    [("llama", 20, {}), ("qwen2", 5, {}), ("qwen3", 5, {}), *(("llama", 5, way) for way in WAYS)],
    ids=str,
    indirect=["family"],
)
def test_training_gives_every_thinking_weight_a_gradient_and_changes_it(tmp_path, family, steps, options):
    replayed = []

    def watch(module, args, given, made):
        if torch.is_grad_enabled() and not replayed:  # the loss of the first step, at the weights of its rollout
            thinking = given["thinking_inputs"]
            replayed.extend((thinking.states, thinking.mask, made.last_hidden_state.detach()))

    trainer, before = run(tmp_path, steps=steps, watch=watch, family=family, **options)
    assert_all_thinking_parts_moved(trainer, before)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == steps
    for row in rows:
        assert 0.5 < row["embeds_ratio"] < 1 and row["projection/grad_norm"] > 0
    states, mask, live = replayed
    off = (live[:, -mask.shape[1] - 1 : -1] - states).norm(dim=-1) / states.norm(dim=-1)
    assert mask.any() and off[mask].max() < 1e-4, "the loss does not replay what the engine thought"


@pytest.mark.parametrize("engine", [PACKED, {}], ids=["continuous", "generate"])
def test_what_a_models_own_file_says_of_sampling_changes_no_rollout(tmp_path, engine):
    losses = []
    for said in ({}, {"min_p": 0.5, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 100))}):
        model = tiny_model("llama", thinking=False)
        model.generation_config.update(**said)
        trainer = small_trainer(tmp_path / str(len(said)), model=model, temperature=1.0, **engine)
        trainer.train()
        losses.append([row[key] for row in trainer.state.log_history if "loss" in row for key in ("loss", "reward")])
        assert all(getattr(model.generation_config, name) == value for name, value in said.items())
    assert losses[0] == losses[1]


def test_a_seed_samples_the_same_and_a_resumed_run_is_the_whole_one(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "temperature": 1.0, "lr_scheduler_type": "constant"}
    whole, _ = run(tmp_path / "whole", steps=4, **saved)
    again, _ = run(tmp_path / "again", steps=2, **saved)
    last = str(tmp_path / "again" / "checkpoint-2")
    rest, _ = run(tmp_path / "again", steps=4, resume_from_checkpoint=last, **saved)
    keys = ("loss", "reward", "grad_norm", "embeds_ratio")
    logs = [[{k: row[k] for k in keys} for row in one.state.log_history if "loss" in row] for one in (whole, rest)]
    assert logs[0] == logs[1] and again.state.global_step == 2
    weights = dict(rest.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.named_parameters())
