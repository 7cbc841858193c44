"""Supervised latent training: thoughts take the place of steps, learn, are those of a rollout, and are kept."""

import json

import pytest
import torch
from runs import lora
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model

from hrpo_patches import HRPOSFTConfig, HRPOSFTTrainer, load_adapter, thinking_roll
from hrpo_patches.training.lessons import lesson_of
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES

PROBLEMS = [("a", ["x1", "y2"], "3"), ("bb", ["x2"], "2"), ("c", ["x3", "y1", "z9"], "4"), ("dddd", ["y7", "z1"], "5")]
DEFAULTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 10,
    "advance_batches": 1,
    "advance_loss": 99.0,  # every batch is learned
    "earlier": 0.0,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "max_completion_length": 40,
}


def lessons():
    tokenizer = byte_tokenizer()
    return [lesson_of(tokenizer, tokenizer(q)["input_ids"], steps, a, "####") for q, steps, a in PROBLEMS]


def trainer_of(folder, family="llama", peft=True, model=None, accuracies=None, **options):
    config = HRPOSFTConfig(output_dir=str(folder), **DEFAULTS | options)
    model = model if model is not None else tiny_model(family, thinking=False)
    return HRPOSFTTrainer(
        model,
        config,
        lessons(),
        lessons()[:2],
        processing_class=byte_tokenizer(),
        peft_config=lora() if peft else None,
        accuracies=accuracies,
    )


def log_of(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("residual", ["projection", "embedding"])
def test_steps_become_thoughts_that_learn_and_are_kept(residual, peft, tmp_path):
    trainer = trainer_of(tmp_path, "qwen2", peft, residual=residual, max_steps=6, thoughts_per_step=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert log_of(trainer, "thoughts") == [0, 2, 4, 6, 6, 6] and trainer.curriculum.stage == 3
    assert all(value > 0 for value in log_of(trainer, "gate/grad_norm")[1:])
    assert len(log_of(trainer, "bptt/gain")) == 5
    after = dict(trainer.model.named_parameters())
    used = [part for part in MODULES if residual == "projection" or part != "thinking_projection"]
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    for part in used:
        assert any(part in name for name in moved), part
    trainer.save_model()
    if peft:
        model = load_adapter(tiny_model("qwen2", thinking=False), tmp_path)
    else:
        model = type(trainer.model).from_pretrained(tmp_path)
    thinking = model.config.thinking
    assert (thinking["thoughts"], thinking["span"], thinking["residual"]) == (6, "thoughts", residual)
    assert model.generation_config.thinking and model.generation_config.thoughts == 6


@pytest.mark.parametrize("span", ["thoughts", "marker"])
def test_the_thoughts_of_given_tokens_are_those_of_a_rollout(span, tmp_path):
    trainer = trainer_of(tmp_path, thinking={"span": span, "r_min": 0.5, "r_max": 0.9}, max_steps=5)
    trainer.train()
    model, tokenizer = trainer.model.eval(), trainer.tokenizer
    prompt = tokenizer("a", return_tensors="pt")
    out = model.generate(
        **prompt, tokenizer=tokenizer, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    start = prompt["input_ids"].shape[1]
    completion = out.sequences[0, start:].tolist()
    assert completion[:3] == [tokenizer.get_vocab()["."]] * 3
    mask = torch.tensor([trainer._classroom.thinks(completion, trainer.curriculum.stage)])
    assert torch.equal(mask, out.thinking_mask) and mask.sum() >= 3
    assert span == "marker" or mask.sum() == 3
    states = thinking_roll(model, out.sequences, out.attention_mask, mask)
    assert (states - out.thinking_states)[mask].abs().max() < 1e-4


def test_fillers_stand_where_thoughts_do_and_nothing_is_blended(tmp_path):
    fillers = trainer_of(tmp_path / "fillers", residual="none")
    thoughts = trainer_of(tmp_path / "thoughts")
    for stage in range(4):
        one, other = (trainer._classroom.batch(lessons(), stage) for trainer in (fillers, thoughts))
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
        assert not one.thinking.any()
    fillers.train()
    assert fillers.curriculum.stage == 3 and "bptt/gain" not in json.dumps(fillers.state.log_history)
    fillers.save_model()
    assert json.loads((tmp_path / "fillers" / "generation_config.json").read_text())["thoughts"] == 3
    assert not any("thinking" in name for name in load_file(tmp_path / "fillers" / "adapter_model.safetensors"))


def test_the_loss_is_the_cross_entropy_of_what_is_written(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, residual="none", peft=False)
    trainer._enter(0)
    batch = trainer._classroom.batch(lessons(), 2)
    monkeypatch.setattr(trainer._classroom, "batch", lambda *_: batch)
    found = trainer.compute_loss(trainer.model, {"lesson": torch.tensor([0])})
    logits = trainer.model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, -batch.width - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_stage_is_learned_by_its_own_batches_and_earlier_ones_are_mixed_in(tmp_path):
    trainer = trainer_of(tmp_path, earlier=0.5, advance_batches=2, max_steps=40)
    trainer.train()
    stages, thoughts = log_of(trainer, "stage"), log_of(trainer, "thoughts")
    assert stages == sorted(stages) and stages[-1] == 3
    assert {0.0, 1.0, 2.0, 3.0} == set(thoughts[stages.index(3) :])  # one step behind, all stages come again
    unlearned = trainer_of(tmp_path / "never", advance_loss=1e-6)
    unlearned.train()
    assert unlearned.curriculum.stage == 0 and unlearned.forced == 0


def test_a_stage_is_not_learned_while_what_follows_the_thoughts_is_not(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, residual="none", advance="once", until=1)
    batch = trainer._classroom.batch(lessons(), 1)
    logps = torch.where(batch.following, -3.0, -0.1)
    monkeypatch.setattr(trainer, "_logps", lambda *_: logps)
    trainer.model.train()
    monkeypatch.setattr(trainer._classroom, "batch", lambda *_: batch)
    loss = trainer.compute_loss(trainer.model, {"lesson": torch.tensor([0])})
    assert loss < 2 and trainer._losses == [pytest.approx(3.0)]


def test_no_stage_begins_after_the_last_step(tmp_path, monkeypatch):
    trainer, seen = trainer_of(tmp_path), []
    monkeypatch.setattr(trainer.curriculum, "add_losses", seen.append)
    trainer.train()
    assert len(seen) == DEFAULTS["max_steps"] - 1


def test_stages_by_epochs_and_at_once(tmp_path):
    by_epoch = trainer_of(tmp_path / "epoch", advance="epoch", max_steps=-1, num_train_epochs=5)
    by_epoch.train()
    assert log_of(by_epoch, "thoughts") == [0, 1, 2, 3, 3]
    once = trainer_of(tmp_path / "once", advance="once", max_steps=2, until=2)
    once.train()
    assert log_of(once, "thoughts") == [2, 2]


def test_training_ends_when_the_accuracy_of_the_last_stage_stands_still(tmp_path):
    values = iter([0.9, 0.1, 0.2, 0.2, 0.15, 0.1, 0.1])
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 100, "patience": 2, "until": 1}
    trainer = trainer_of(tmp_path, accuracies=lambda trainer: {"accuracy": next(values)}, **options)
    trainer.train()
    assert trainer.state.global_step == 6  # 0.9, then 0.1 and 0.2 are no better
    assert log_of(trainer, "eval_stage") == [1, 1, 1] and len(log_of(trainer, "eval_loss")) == 3


def test_what_least_squares_leave_over_is_logged_once(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    (left,) = log_of(trainer, "projection/left_over")
    assert 0 <= left <= 1
    assert not log_of(trainer_of(tmp_path / "random", projection_start="random"), "projection/left_over")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"until": 4}, "no solution has more than 3 steps"),
        ({"max_completion_length": 5}, "max_completion_length=5"),
        ({"thoughts_per_step": 20}, "60 thoughts"),
        ({"max_steps": 3}, "training ends after"),
        ({"advance": "epoch", "max_steps": -1, "num_train_epochs": 3}, "training ends after 3"),
        ({"residual": "none", "projection_start": "lstsq"}, "residual='projection'"),
        ({"residual": "embedding", "projection_start": "lstsq"}, "residual='projection'"),
        ({"advance": "soon"}, "advance must be one of"),
        ({"earlier": 1.0}, "earlier"),
        ({"thoughts": 3}, "thoughts_per_step"),
        ({"thoughts_per_step": 0}, "thoughts_per_step must be"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, word, tmp_path):
    with pytest.raises(InputError, match=word):
        trainer_of(tmp_path, **options)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(HRPOSFTConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match=r"one process sees 2 GPUs.*accelerate launch"):
        trainer_of(tmp_path)
