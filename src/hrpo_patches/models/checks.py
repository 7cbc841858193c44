"""Refuses what a user gave in one line; in a module of its own because it must not import what it is used by."""

from __future__ import annotations

from hrpo_thinking.errors import InputError


def require(condition: object, otherwise: str) -> None:
    """Raise `InputError` with the text `otherwise` unless the condition holds."""
    if not condition:
        raise InputError(otherwise)
