"""Checks what reward functions return before a step is taken with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import update_wrapper
from inspect import iscoroutinefunction
from typing import Any

import torch
from torch import nn

from hrpo_thinking.errors import InputError


def checked_rewards(reward_funcs: Any) -> Any:
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
        return [checked_rewards(one) for one in reward_funcs]
    if not callable(reward_funcs) or isinstance(reward_funcs, nn.Module):
        return reward_funcs
    return _with_check(reward_funcs)


def _with_check(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _checked(function, function(*args, **kwargs), len(kwargs["completions"]))

    async def call_later(*args: Any, **kwargs: Any) -> Any:
        return _checked(function, await function(*args, **kwargs), len(kwargs["completions"]))

    later = iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
    return update_wrapper(call_later if later else call, function)


def _checked(function: Any, rewards: Any, completions: int) -> list[Any]:
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(rewards, Iterable):
        raise InputError(
            f"reward function {name} returned {rewards!r}; expected a list with one reward per completion."
        )
    given = list(rewards)
    if len(given) != completions:
        raise InputError(
            f"reward function {name} returned {len(given)} rewards for {completions} completions; expected one per "
            f"completion."
        )
    for number, reward in enumerate(given):
        if not _is_reward(reward):
            raise InputError(
                f"reward function {name} returned {reward!r} for completion {number}; expected a finite number, or "
                f"None where it does not apply."
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
