"""Each task: a row as the hub or a file has it goes in; the exact question, gold and prompt come out; it grades."""

import json
import sys

import pytest

from hrpo_patches.tasks import TASKS, task_named
from hrpo_patches.tasks.math import boxed
from hrpo_patches.tasks.problems import find_task, load_problems
from hrpo_patches.tasks.prompts import examples_of, prompt_of
from hrpo_patches.tasks.retrieval import with_retrieved
from hrpo_patches.tasks.rewards import grade
from hrpo_thinking.errors import InputError

BIRD = "Which is a bird?"
CHOICES = {"text": ["bat", "wren", "bee"], "label": ["1", "2", "3"]}
OPTIONS = "Which is a bird?\nA. bat\nB. wren\nC. bee"
WIKI = {"title": ["Ida", "Lyon"], "sentences": [["Ida was born ", "in Lyon."], ["A city."]]}
ROWS = [
    ("gsm8k", {"question": " How many? ", "answer": "It is 1 + 2 = 3.\n#### 1,003"}, "How many?", ["1,003"]),
    ("gsm8k", {"question": "How many?", "answer": 42}, "How many?", ["42"]),
    ("svamp", {"Body": "Tom has 3.", "Question": "How many?", "Answer": 145.0}, "Tom has 3. How many?", ["145"]),
    ("svamp", {"Body": "Tom has 3.", "Question": "How many?", "Answer": "2.5"}, "Tom has 3. How many?", ["2.5"]),
    ("mawps", {"question": "How many?", "result": "12"}, "How many?", ["12"]),
    ("mawps", {"question": "How many?", "result": "1_450"}, "How many?", ["1450"]),
    ("mawps", {"input": "How many?", "target": 14.0}, "How many?", ["14"]),
    (
        "math",
        {"problem": "What is $x$?", "solution": "So \\boxed{2}, no, \\boxed{\\frac{1}{2}}."},
        "What is $x$?",
        ["\\frac{1}{2}"],
    ),
    ("math", {"problem": "What is $x$?", "answer": "\\pi", "solution": "none"}, "What is $x$?", ["\\pi"]),
    ("mmlu", {"question": BIRD, "choices": ["bat", "wren ", "bee"], "answer": 1}, OPTIONS, ["B"]),
    (
        "mmlu",
        {
            "question": "Which is a bird?",
            "choices": {"text": ["bat", "wren", "bee"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        OPTIONS,
        ["B"],
    ),
    (
        "arc_challenge",
        {
            "question": "Which is a bird?",
            "choices": {"text": ["bat", "wren", "bee"], "label": list("ABC")},
            "answerKey": "C",
        },
        OPTIONS,
        ["C"],
    ),
    *[
        (name, {"question": "Where?", "golden_answers": ["Lyon", "Lyons"]}, "Where?", ["Lyon", "Lyons"])
        for name in ("rag", "nq", "triviaqa", "hotpotqa", "2wikimultihopqa", "bamboogle")
    ],
    ("nq", {"question": "Where?", "answer": "Lyon"}, "Where?", ["Lyon"]),
    ("nq", {"question": "Where?", "golden_answers": ["Lyon", " "]}, "Where?", ["Lyon"]),
    ("nq", {"question": "Where?", "answer": ["Lyon"]}, "Where?", ["Lyon"]),
]


@pytest.mark.parametrize(("name", "row", "question", "golds"), ROWS)
def test_a_row_becomes_its_question_and_golds(name, row, question, golds):
    task = task_named(name)
    problem = task.read(row, "row 1")
    assert problem == {"question": question, "answer": golds}
    assert task.is_right(problem, golds[-1]) and not task.is_right(problem, "none of them")


def test_every_task_has_a_row_here():
    assert {row[0] for row in ROWS} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_prompts_show_the_marker_and_are_filled_in(name):
    task = task_named(name)
    assert task.name == name
    for marker in ("####", "</{answer}>"):
        plain = prompt_of(task, "The question?", marker, [], chat=False)
        assert marker in plain and plain.endswith("\n\nThe question?\n")
        examples = examples_of(task, marker, len(task.examples), [])
        assert len(examples) >= 2
        shown = prompt_of(task, "The question?", marker, examples, chat=False)
        assert shown == "\n\n".join([*examples, "The question?"]) + "\n" and shown.count(marker) == len(examples)
        system, user = prompt_of(task, "The question?", marker, examples, chat=True)
        assert user["content"] == "The question?" and all(example in system["content"] for example in examples)
        for text in (plain, shown, system["content"]):
            assert "{marker}" not in text and "{{" not in text


@pytest.mark.parametrize("name", TASKS)
def test_the_worked_examples_end_in_an_answer_that_the_grader_reads(name):
    task = task_named(name)
    for example in examples_of(task, "####", len(task.examples), []):
        answer = example.rpartition("#### ")[2]
        assert task.is_right({"question": "?", "answer": [answer]}, answer)


def test_the_whole_prompts_of_one_problem():
    problem = task_named("mmlu").read({"question": BIRD, "choices": ["bat", "wren", "bee"], "answer": 1}, "row")
    (example,) = examples_of(task_named("mmlu"), "####", 1, [])
    assert prompt_of(task_named("mmlu"), problem["question"], "####", [example], chat=False) == (
        "Which planet is nearest to the sun?\nA. Venus\nB. Mercury\nC. Mars\nD. Earth\n"
        "Mercury's orbit lies inside that of Venus, the next one. #### B\n\n"
        "Which is a bird?\nA. bat\nB. wren\nC. bee\n"
    )
    assert prompt_of(task_named("math"), "What is $x$?", "####", [], chat=True) == [
        {
            "role": "system",
            "content": "Solve the problem step by step. When you are done, write #### and then the final answer "
            "alone, like this: #### \\frac{1}{2}",
        },
        {"role": "user", "content": "What is $x$?"},
    ]
    assert prompt_of(task_named("nq"), "Where?", "####", [], chat=False) == (
        "Answer the question from the documents step by step. When you are done, write #### and then the answer "
        "alone, as short as possible, like this: #### Marie Curie\n\nWhere?\n"
    )


@pytest.mark.parametrize(
    ("row", "documents"),
    [
        ({"context": WIKI}, "[1] Ida: Ida was born in Lyon.\n[2] Lyon: A city.\n"),
        ({"metadata": {"context": WIKI}}, "[1] Ida: Ida was born in Lyon.\n[2] Lyon: A city.\n"),
        ({"metadata": {"context": {"title": ["Ida"], "content": ["Born."]}}}, "[1] Ida: Born.\n"),
        ({"context": ["one", "two"]}, "[1] one\n[2] two\n"),
        ({"context": [["Ida", ["Ida was born ", "in Lyon."]]]}, "[1] Ida: Ida was born in Lyon.\n"),
        ({"context": [{"title": "Ida", "text": "Born."}, {"text": "x"}]}, "[1] Ida: Born.\n[2] x\n"),
        ({"context": "one text", "metadata": "x"}, "[1] one text\n"),
    ],
)
def test_documents_that_come_with_a_question_stand_before_it(row, documents):
    problem = {"question": "Where?", "answer": ["Lyon"]}
    assert with_retrieved([problem], [row], None) == [{"question": documents + "Where?", "answer": ["Lyon"]}]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "svamp",
            {"Body": "x", "Question": "y"},
            r"row 1 has \['Body', 'Question'\], but .*needs 'Body' and",
        ),
        ("mawps", {"x": 1}, "needs 'question' and 'result', or 'input' and 'target'"),
        ("gsm8k", {"question": "x", "answer": "because ####"}, "has nothing after ####"),
        ("math", {"problem": "x", "solution": "2"}, "has no .boxed answer"),
        ("math", {"problem": "x", "solution": "\\boxed{2"}, "without its closing brace"),
        ("mmlu", {"question": "x", "choices": ["a", "b"], "answer": 2}, "option number 2 of 2"),
        ("mmlu", {"question": "x", "choices": ["a"], "answer": 0}, "has 1 options"),
        ("mmlu", {"question": "x", "choices": "ab", "answer": 0}, "a list as its choices"),
        ("mmlu", {"question": "x", "choices": ["a", "b"], "answerKey": "A"}, "choices with text and label"),
        (
            "mmlu",
            {"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "none of its options",
        ),
        ("nq", {"question": "x", "answer": 7}, "a text, or a list of texts"),
        ("nq", {"question": "x", "answer": ["", " "]}, "has an empty answer"),
        ("gsm8k", {"question": "Capital?", "answer": "Paris"}, "has the answer 'Paris', which is not one number"),
        (
            "gsm8k",
            {"question": "x \ud83d", "answer": "5"},
            "row 1 has columns of another form than a problem of gsm8k",
        ),
        ("mmlu", {"question": "x", "choices": {"text": 5, "label": 7}, "answerKey": "B"}, "of another form"),
        ("gsm8k", {"question": "x", "answer": "#### 5 or 6"}, "is not one number"),
        ("svamp", {"Body": "x", "Question": "y", "Answer": float("nan")}, "is not one number"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_sentence(name, row, message):
    with pytest.raises(InputError, match=message):
        task_named(name).read(row, "row 1")


def test_an_unknown_task_is_answered_with_the_nearest_names():
    with pytest.raises(InputError, match="unknown task 'gsm8'; did you mean gsm8k"):
        task_named("gsm8")
    with pytest.raises(InputError, match="there are 2wikimultihopqa, arc_challenge"):
        task_named("zzzz")


def test_boxes_nest_and_may_lack_their_braces():
    assert boxed("a \\boxed{\\text{x} + {y}} b") == "\\text{x} + {y}" and boxed("so \\boxed 7.") == "7"


def test_a_gym_task_is_graded_by_its_generator_and_plain_numbers_in_any_notation():
    numbers = find_task("reasoning_gym:chain_sum", None, size=5, seed=1)
    problem = load_problems(numbers)[2]
    gold = problem["answer"][0]
    assert numbers.is_right(problem, f"{gold}.0") and not numbers.is_right(problem, "x")
    task = find_task("gsm8k", "reasoning_gym:countdown", size=5, seed=1)
    problems = load_problems(task)
    assert task.name == "reasoning_gym:countdown" and [problem["index"] for problem in problems] == list(range(5))
    for problem in problems:
        gold = problem["answer"][0]
        assert task.is_right(problem, gold) and task.is_right(problem, f"({gold})")  # another way to write it
        assert not task.is_right(problem, "1 +") and not task.is_right(problem, "9**9**9**9")
        assert not task.is_right(problem, "1<<9999999999999") and not task.is_right(problem, "[0]*10000000000000")


@pytest.mark.parametrize("name", ["mini_sudoku", "n_queens", "rotate_matrix", "tower_of_hanoi", "binary_matrix"])
def test_answers_of_several_lines_are_read_to_their_end(name):
    task = find_task(f"reasoning_gym:{name}", None, size=2, seed=1)
    for problem in load_problems(task):
        (gold,) = problem["answer"]
        assert "\n" in gold and grade(task, problem, f"So #### {gold}\nand that is it", "####") == 1
        assert grade(task, problem, f"#### {gold.splitlines()[0]}", "####") == 0


def test_an_answer_of_another_kind_than_the_gold_one_is_wrong():
    task = find_task("reasoning_gym:game_of_life_halting", None, size=4, seed=1)
    for problem in load_problems(task):
        assert task.is_right(problem, problem["answer"][0])
        assert not any(task.is_right(problem, answer) for answer in ("0", "1", ".", "-", "#", "[]", ""))


@pytest.mark.parametrize("context", [5, [5, 6], {"title": 5, "sentences": ["a"]}, [{"title": "t", "text": 5}]])
def test_a_context_that_cannot_be_read_is_one_sentence(context):
    row = {"question": "Where?", "answer": "x", "context": context}
    with pytest.raises(InputError, match="the question 'Where.' has a context that cannot be read"):
        with_retrieved([task_named("nq").read(row, "row 1")], [row], None)


@pytest.mark.parametrize(
    ("line", "sentence"), [("[" * 100_000, "line 1"), ('{"answer": ' + "9" * 5000 + "}", "line 1")]
)
def test_json_that_python_cannot_hold_is_one_sentence(tmp_path, line, sentence):
    (tmp_path / "odd.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=sentence):
        load_problems(task_named("gsm8k"), str(tmp_path / "odd.jsonl"))


@pytest.mark.parametrize("name", ["countdown", "spiral_matrix", "polynomial_multiplication", "simple_integration"])
def test_no_answer_is_ever_run_as_a_program(name, tmp_path):
    task = find_task(f"reasoning_gym:{name}", None, size=2, seed=1)
    problem = load_problems(task)[0]
    touch = f"__import__('os').system('touch {tmp_path / 'touched'}')"
    spelt = "+".join(f"chr({ord(character)})" for character in touch)
    for answer in (touch, f"exec({spelt})", f"eval({spelt})", f"[{touch}]", f"1+{touch}"):
        assert not task.is_right(problem, answer)
    assert not (tmp_path / "touched").exists()
    assert task.is_right(problem, problem["answer"][0])


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "files", "rows"),
    [
        ("gsm8k", ("gsm8k/train.jsonl", "gsm8k/test.jsonl"), 8792),
        ("svamp", ("svamp/test.jsonl",), 1000),
        ("mawps", ("mawps/singleop.jsonl", "mawps/addsub.jsonl"), 957),
        ("mmlu", ("mmlu_stem/test.jsonl",), 3018),
    ],
)
def test_real_golds_are_right_against_themselves_and_wrong_against_a_neighbours(shared_data, name, files, rows):
    task = task_named(name)
    problems = [problem for file in files for problem in load_problems(task, str(shared_data / file))]
    assert len(problems) == rows
    for problem, neighbour in zip(problems, problems[1:] + problems[:1], strict=True):
        gold, other = problem["answer"][0], neighbour["answer"][0]
        assert task.is_right(problem, gold), problem
        if name == "mmlu":
            assert task.is_right(problem, f"({gold})") and (gold == other or not task.is_right(problem, other))
        else:
            value, different = (float(text.replace(",", "")) for text in (gold, other))
            assert task.is_right(problem, f"{value:,} in all")
            if value not in (different, different * 100, different / 100):
                assert not task.is_right(problem, other), (gold, other)


def test_a_file_of_a_task_is_read_line_by_line(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(ROWS[i][1]) for i in (4, 6)))
    assert [p["answer"] for p in load_problems(task_named("mawps"), str(tmp_path / "own.jsonl"))] == [["12"], ["14"]]


OUTSIDE = """
from hrpo_patches.tasks import Task
from hrpo_patches.tasks.gsm8k import SVAMP

TASK = Task(
    name="echo",
    train=(),
    test=(),
    shapes={("say",): lambda row: {"question": row["say"], "answer": [row["say"]]}},
    instruction="Repeat it after {marker}.",
    examples=(),
    grader=SVAMP.grader,
)
NUMBER = 7
"""


def test_a_task_from_outside_is_named_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "outside_tasks.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = find_task("outside_tasks:TASK", None)
    assert task.name == "echo" and task.read({"say": "7"}, "row 1")["answer"] == ["7"]
    for name, message in (
        ("outside_tasks:MISSING", "could not be imported"),
        ("no_such_module:TASK", "could not be imported"),
        ("outside_tasks:NUMBER", "is a int, and must be a hrpo_patches.tasks.Task"),
    ):
        with pytest.raises(InputError, match=message):
            find_task(name, None)


def test_a_task_beside_the_command_is_found_and_its_braces_are_braces(tmp_path, monkeypatch):
    code = """
from dataclasses import replace
from hrpo_patches.tasks import task_named
TASK = replace(task_named("gsm8k"), name="own", instruction='Answer as {"a": 1}, then {marker}.')
"""
    (tmp_path / "a_task_of_ones_own.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", ".")])
    task = task_named("a_task_of_ones_own:TASK")
    (system, _) = prompt_of(task, "?", "##", [], chat=True)
    assert system["content"] == 'Answer as {"a": 1}, then ##.'
    with pytest.raises(InputError, match="could not be imported"):
        task_named("./a_task_of_ones_own.py:TASK")
