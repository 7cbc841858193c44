"""Worked solutions are read from lists of steps or GSM8K's lines, and what cannot be read names its file and line."""

import json

import pytest

from hrpo_patches.tasks.problems import find_task
from hrpo_patches.tasks.worked import worked_problems
from hrpo_thinking.errors import InputError


def read(folder, *rows, marker="####"):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return worked_problems(find_task("gsm8k", None), str(folder / "rows.jsonl"), "train", marker)


def test_steps_are_a_list_or_the_lines_of_gsm8k_without_its_calculator(tmp_path):
    listed, lines = read(
        tmp_path,
        {"question": "a?", "steps": ["1 + 1 = 2", " 2 + 1 = 3 "], "answer": 3},
        {"question": "b?", "answer": "Two is 1 + 1 = <<1+1=2>>2.\n\nSo 3.\n#### 3"},
    )
    assert listed == {"question": "a?", "answer": ["3"], "steps": ["1 + 1 = 2", "2 + 1 = 3"]}
    assert lines == {"question": "b?", "answer": ["3"], "steps": ["Two is 1 + 1 = 2.", "So 3."]}


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"question": "a?", "answer": "3"}, "no steps"),
        ({"question": "a?", "steps": [" "], "answer": "3"}, "no steps"),
        ({"question": "a?", "steps": "1 + 1", "answer": "3"}, "list of texts"),
        ({"question": "a?", "steps": ["so", "it is #### 3"], "answer": "3"}, "answer marker"),
    ],
)
def test_a_row_that_cannot_be_taught_is_named_by_file_and_line(tmp_path, row, word):
    good = {"question": "a?", "steps": ["x"], "answer": "3"}
    with pytest.raises(InputError, match=rf"rows.jsonl line 2.* {word}"):
        read(tmp_path, good, row)
