"""Checks what reward functions return before a step is taken with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import update_wrapper
from inspect import iscoroutinefunction
from typing import Any

import torch
from torch import nn

from hrpo_thinking.errors import InputError

RewardFunc = str | nn.Module | Callable[..., Any]  # a model's name, a model or a function, as TRL takes them
RewardFuncs = RewardFunc | list[RewardFunc] | None


def checked_rewards(reward_funcs: RewardFuncs) -> RewardFuncs:
    """The same reward functions, which raise where TRL would train with an invalid reward.

    TRL treats a reward that is infinite or not a number as missing. Models, and names of models, are returned as they
    are.

    Args:
        reward_funcs: one or a list, as for `trl.GRPOTrainer`. Each returns one reward per completion: a finite
            number, or None where it does not apply.

    Raises:
        InputError: by such a function, in training: it returned something else.
    """
    if isinstance(reward_funcs, list):
        return [_with_check(one) for one in reward_funcs]
    return _with_check(reward_funcs) if reward_funcs is not None else None


def _with_check(reward: RewardFunc) -> RewardFunc:
    if isinstance(reward, (str, nn.Module)):
        return reward

    def call(*args: Any, **kwargs: Any) -> list[object]:
        return _checked(reward, reward(*args, **kwargs), len(kwargs["completions"]))

    async def call_later(*args: Any, **kwargs: Any) -> list[object]:
        return _checked(reward, await reward(*args, **kwargs), len(kwargs["completions"]))

    # Also of an object that is called. TRL asks the wrapper the same, and awaits it or does not.
    later = iscoroutinefunction(reward) or iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004
    return update_wrapper(call_later if later else call, reward)


def _checked(function: Callable[..., Any], rewards: object, completions: int) -> list[object]:
    values = list(rewards) if isinstance(rewards, Iterable) else None
    if values is None:
        problem = f"{rewards!r}; expected a list with one reward per completion"
    elif len(values) != completions:
        problem = f"{len(values)} rewards for {completions} completions; expected one per completion"
    else:
        invalid = [number for number, value in enumerate(values) if not _is_reward(value)]
        if not invalid:
            return values
        problem = (
            f"{values[invalid[0]]!r} for completion {invalid[0]}; expected a finite number, or None where it does not "
            f"apply"
        )
    name = getattr(function, "__name__", type(function).__name__)
    raise InputError(f"reward function {name} returned {problem}.")


def _is_reward(reward: Any) -> bool:
    """Whether it is None, or a number that is finite in float32."""
    if reward is None:
        return True
    try:  # anything that has a float: tensors and numpy's scalars, too
        return not isinstance(reward, (str, bytes)) and abs(float(reward)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
