"""Says whether an answer is right; knows two texts, the gold answer and the given one, and not where they come from.

Four kinds: numbers, mathematical expressions, options, and names. Rewards and evaluations use the same functions; none
raises, whatever the texts, and none reads more of an answer than its first 200 characters.
"""

from collections.abc import Callable

from hrpo_patches.tasks.graders.expressions import expression
from hrpo_patches.tasks.graders.names import exact_match, normalized
from hrpo_patches.tasks.graders.numbers import is_number, number
from hrpo_patches.tasks.graders.options import choice

Grader = Callable[[str, str], bool]

__all__ = ["Grader", "choice", "exact_match", "expression", "is_number", "normalized", "number"]
