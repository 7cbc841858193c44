"""SVAMP (Patel et al., arXiv 2103.07191): short word problems, each told in a body and a question."""

from __future__ import annotations

from hrpo_patches.tasks.base import Problem, Row, Task, plain_number, text
from hrpo_patches.tasks.gsm8k import TASK as GSM8K


def read(row: Row) -> Problem:
    """Body and question as one text."""
    return {"question": text(row, "Body", "Question"), "answer": [plain_number(row["Answer"])]}


TASK = Task(
    name="svamp",
    train=("ChilleD/SVAMP@train",),
    test=("ChilleD/SVAMP@test",),
    shapes={("Body", "Question", "Answer"): read},
    instruction=GSM8K.instruction,
    examples=GSM8K.examples,
    grader=GSM8K.grader,
)
