"""MMLU (Hendrycks et al., arXiv 2009.03300) and ARC (Clark et al., arXiv 1803.05457): questions with options."""

from __future__ import annotations

import dataclasses
from string import ascii_uppercase

from hrpo_patches.tasks.base import Problem, Row, Task, Unreadable, steps, text
from hrpo_patches.tasks.graders.options import choice


def with_options(question: str, options: list[str], right: int) -> Problem:
    """The question, each option on a line with its letter, and the letter of the right one."""
    if not 2 <= len(options) <= 8:
        raise Unreadable(f"has {len(options)} options; there must be 2 to 8")
    if not 0 <= right < len(options):
        raise Unreadable(f"says that option number {right} of {len(options)} is right, counted from 0")
    letters = ascii_uppercase[: len(options)]
    lines = [f"{letter}. {str(option).strip()}" for letter, option in zip(letters, options, strict=True)]
    return {"question": "\n".join([question, *lines]), "answer": [letters[right]]}


def read_mmlu(row: Row) -> Problem:
    """`choices` is a list, `answer` an index."""
    if not isinstance(row["choices"], list) or not isinstance(row["answer"], int):
        raise Unreadable("needs a list as its choices and an index as its answer")
    return with_options(text(row, "question"), row["choices"], row["answer"])


def read_arc(row: Row) -> Problem:
    """`choices` is {"text": [...], "label": [...]}, `answerKey` one of the labels, which may be digits."""
    choices = row["choices"]
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise Unreadable("needs choices with text and label")
    if row["answerKey"] not in choices["label"]:
        raise Unreadable(f"has the answer {row['answerKey']!r}, which is none of its options")
    return with_options(text(row, "question"), choices["text"], choices["label"].index(row["answerKey"]))


MMLU = Task(
    name="mmlu",
    train=("cais/mmlu:all@auxiliary_train", "allenai/ai2_arc:ARC-Challenge@train", "allenai/ai2_arc:ARC-Easy@train"),
    test=("TIGER-Lab/MMLU-STEM@test",),
    shapes={("question", "choices", "answerKey"): read_arc, ("question", "choices", "answer"): read_mmlu},
    instruction=steps("B", answer="the letter of the right option alone"),
    examples=(
        "Which planet is nearest to the sun?\nA. Venus\nB. Mercury\nC. Mars\nD. Earth\n"
        "Mercury's orbit lies inside that of Venus, the next one. {marker} B",
        "What is the derivative of x^3?\nA. 3x^2\nB. x^2\nC. 3x\nD. x^4 / 4\n"
        "The power rule brings the exponent down and lowers it by one: 3x^2. {marker} A",
        "Which of these is no mammal?\nA. whale\nB. bat\nC. dolphin\nD. penguin\n"
        "Whales, bats and dolphins nurse their young, and penguins are birds. {marker} D",
    ),
    grader=choice,
)
ARC = dataclasses.replace(
    MMLU, name="arc_challenge", train=MMLU.train[1:], test=("allenai/ai2_arc:ARC-Challenge@test",)
)
