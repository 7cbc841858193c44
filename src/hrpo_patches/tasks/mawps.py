"""MAWPS (Koncel-Kedziorski et al., NAACL 2016): one-step word problems, in the two forms that are about."""

from __future__ import annotations

from hrpo_patches.tasks.base import Problem, Row, Task, plain_number, text
from hrpo_patches.tasks.gsm8k import TASK as GSM8K


def read_hub(row: Row) -> Problem:
    """As in MU-NLPC/Calc-mawps."""
    return {"question": text(row, "question"), "answer": [plain_number(row["result"])]}


def read_file(row: Row) -> Problem:
    """As in the files that come with other evaluations."""
    return {"question": text(row, "input"), "answer": [plain_number(row["target"])]}


TASK = Task(
    name="mawps",
    train=("MU-NLPC/Calc-mawps@train",),
    test=("MU-NLPC/Calc-mawps@test",),
    shapes={("question", "result"): read_hub, ("input", "target"): read_file},
    instruction=GSM8K.instruction,
    examples=GSM8K.examples,
    grader=GSM8K.grader,
)
