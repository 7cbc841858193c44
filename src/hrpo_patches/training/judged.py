"""Reward functions whose answers are looked at before a step is taken with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import update_wrapper
from inspect import iscoroutinefunction
from typing import Any

import torch
from torch import nn

from hrpo_thinking.errors import InputError


def judged(reward_funcs: Any) -> Any:
    """The same reward functions, which raise where TRL would train with what they said.

    TRL takes a reward that is not a number, or infinite, for none at all. Models, and names of models, are left alone.

    Args:
        reward_funcs: one or a list, as for `trl.GRPOTrainer`. Each gives, for each completion, a finite number, or
            None for one that it does not judge.

    Raises:
        InputError: by such a function, in training: it gave something else, or not one for each completion.
    """
    if isinstance(reward_funcs, list):
        return [judged(one) for one in reward_funcs]
    if not callable(reward_funcs) or isinstance(reward_funcs, nn.Module):
        return reward_funcs
    return _judged(reward_funcs)


def _judged(function: Callable[..., Any]) -> Callable[..., Any]:
    def judge(*args: Any, **kwargs: Any) -> Any:
        return _checked(function, function(*args, **kwargs), len(kwargs["completions"]))

    async def judge_later(*args: Any, **kwargs: Any) -> Any:
        return _checked(function, await function(*args, **kwargs), len(kwargs["completions"]))

    later = iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
    return update_wrapper(judge_later if later else judge, function)


def _checked(function: Any, rewards: Any, completions: int) -> list[Any]:
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(rewards, Iterable):
        raise InputError(f"the reward function {name} gave {rewards!r}; give a list, a reward a completion.")
    given = list(rewards)
    if len(given) != completions:
        raise InputError(
            f"the reward function {name} gave {len(given)} rewards for {completions} completions; give one for each."
        )
    for number, reward in enumerate(given):
        if not _is_reward(reward):
            raise InputError(
                f"the reward function {name} gave {reward!r} for completion {number}; give a finite number, or None "
                f"for a completion that it does not judge."
            )
    return given


def _is_reward(reward: Any) -> bool:
    """Whether it is None, or a number that is finite in float32."""
    if reward is None:
        return True
    try:
        return not isinstance(reward, (str, bytes)) and abs(float(reward)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
