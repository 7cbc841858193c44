"""The four errors that reach a user on purpose, and how a requirement raises one."""


class InputError(ValueError):
    """Something the user gave cannot work; the message says what, and what to do instead."""


class PatchError(ImportError):
    """An upstream package cannot be patched; the message names package, version, file, hunk and the remedy."""


class SaveError(RuntimeError):
    """A checkpoint could not be written, or a push failed; what was saved before is whole."""


class NonFiniteError(FloatingPointError):
    """A training step is not finite; it was not taken, and the message says where its inputs are."""


def require(condition: object, otherwise: str) -> None:
    """Raise `InputError` with the text `otherwise` unless the condition holds.

    The text is made in any case: it must not read what exists only where the condition fails.
    """
    if not condition:
        raise InputError(otherwise)
