"""Word problems with a number for an answer: GSM8K, which any rows with a question and a number can be; SVAMP; MAWPS.

Cobbe et al., arXiv 2110.14168; Patel et al., arXiv 2103.07191; Koncel-Kedziorski et al., NAACL 2016.
"""

from __future__ import annotations

from dataclasses import replace

from hrpo_patches.tasks.base import Problem, Reader, Row, Task, Unreadable, plain_number, steps, text
from hrpo_patches.tasks.graders.numbers import number

GOLD_MARKER = "####"  # of GSM8K's own answers


def read(row: Row) -> Problem:
    """A worked solution with its answer after `####`, or an answer alone."""
    answer = row["answer"]
    if isinstance(answer, str):
        answer = answer.rpartition(GOLD_MARKER)[2].strip()
        if not answer:
            raise Unreadable(f"has nothing after {GOLD_MARKER} in its answer")
    return {"question": text(row, "question"), "answer": [plain_number(answer)]}


def shape(*columns: str) -> dict[tuple[str, ...], Reader]:
    """Rows of these columns, of which the last holds the number and the others, as one text, the question."""
    *question, answer = columns
    return {columns: lambda row: {"question": text(row, *question), "answer": [plain_number(row[answer])]}}


TASK = Task(
    name="gsm8k",
    train=("openai/gsm8k:main@train",),
    test=("openai/gsm8k:main@test",),
    shapes={("question", "answer"): read},
    instruction=steps("42"),
    examples=(
        "A box holds 6 eggs. Tom buys 3 boxes and breaks 2 eggs. How many whole eggs has he?\n"
        "He buys 3 * 6 = 18 eggs, and 18 - 2 = 16 of them are whole. {marker} 16",
        "Mia reads 12 pages a day. How many days does she need for 84 pages?\nShe needs 84 / 12 = 7 days. {marker} 7",
        "A pen costs $1.50 and a book four times as much. How many dollars do both cost together?\n"
        "The book costs 4 * 1.50 = 6 dollars, and both cost 6 + 1.50 = 7.50 dollars. {marker} 7.50",
        "Of 40 children 16 walk to school and half of the others cycle. How many cycle?\n"
        "40 - 16 = 24 do not walk, and half of them are 24 / 2 = 12. {marker} 12",
    ),
    grader=number,
)
SVAMP = replace(
    TASK,
    name="svamp",
    train=("ChilleD/SVAMP@train",),
    test=("ChilleD/SVAMP@test",),
    shapes=shape("Body", "Question", "Answer"),
)
MAWPS = replace(
    TASK,
    name="mawps",
    train=("MU-NLPC/Calc-mawps@train",),
    test=("MU-NLPC/Calc-mawps@test",),
    shapes=shape("question", "result") | shape("input", "target"),  # of the hub, and of files with other evaluations
)
