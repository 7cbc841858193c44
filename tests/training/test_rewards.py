"""Rewards that are none stop a run before a step is taken with them; what a reward function raises is its own."""

import math

import pytest
import torch
from runs import small_trainer

from hrpo_patches.training.rewards import checked_rewards
from hrpo_thinking.errors import InputError


def giving(change):
    def reward(completions, **_):
        return change([float(i % 3) for i in range(len(completions))])

    return reward


BAD = [
    (lambda good: [*good[:-1], math.nan], "returned nan for completion 7; expected a finite number"),
    (lambda good: [math.inf, *good[1:]], "returned inf for completion 0"),
    (lambda good: ["one", *good[1:]], "returned 'one' for completion 0"),
    (lambda good: good[:-1], "returned 7 rewards for 8 completions; expected one"),
    (lambda good: [*good, 0.0], "returned 9 rewards for 8 completions"),
    (lambda good: 1.0, "returned 1.0; expected a list"),
    (lambda good: torch.zeros(len(good), 2), r"returned tensor\(\[0., 0.\]\) for completion 0"),
    (lambda good: [10**400, *good[1:]], "returned 1000"),
    (lambda good: [1e39, *good[1:]], r"returned 1e\+39 for completion 0"),  # infinite in float32
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_a_reward_that_is_none_stops_the_run_by_its_name_before_a_step_is_taken(change, sentence, tmp_path):
    calls = []

    def later(good):
        calls.append(1)
        return change(good) if len(calls) == 2 else good

    trainer = small_trainer(tmp_path, reward=giving(later), max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError, match=f"reward function reward {sentence}"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert_next_steps_follow(tmp_path, giving(lambda good: good))


def assert_next_steps_follow(folder, reward):
    """A run in this folder is resumed from its first checkpoint."""
    again = small_trainer(folder, reward=reward, max_steps=3, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert again.state.global_step == 3


def test_a_reward_function_that_raises_shows_its_own_error_and_the_checkpoint_is_whole(tmp_path):
    calls = []

    def reward(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("answer")
        return [float(i % 3) for i in range(len(completions))]

    trainer = small_trainer(tmp_path, reward=reward, max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(KeyError, match="answer"):
        trainer.train()
    assert_next_steps_follow(tmp_path, reward)


def test_the_error_of_a_reward_function_that_yields_is_its_own(tmp_path):
    def reward(completions, **_):
        yield 1.0
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        small_trainer(tmp_path, reward=reward).train()


def test_a_reward_function_may_judge_some_completions_only_and_be_a_coroutine_or_a_tensor(tmp_path):
    async def later(completions, **_):
        return [None, *map(float, range(len(completions) - 1))]

    def tensor(completions, **_):
        return torch.arange(len(completions)).float()

    assert checked_rewards("a/model") == "a/model" and checked_rewards([later])[0].__name__ == "later"
    trainer = small_trainer(tmp_path, reward=[later, tensor])
    trainer.train()
    assert "rewards/later/mean" in trainer.state.log_history[0]


def test_equal_rewards_teach_nothing_and_break_nothing(tmp_path):
    trainer = small_trainer(tmp_path, reward=giving(lambda good: [1.0] * len(good)), beta=0.0, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == [0.0, 0.0]
