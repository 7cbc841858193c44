"""Passing things on: every written step and answer is what really happened, and every move is even."""

import re

import pytest

from hrpo_patches.tasks.passing import NAMES
from hrpo_patches.tasks.problems import find_task, load_problems
from hrpo_thinking.errors import InputError


def followed(problem, names):
    """Who has each thing after each move, read from the question alone; and the moves as permutations."""
    start, *moves, asked = problem["question"].split("\n")
    holder = {thing: who for who, thing in re.findall(r"(\w+) has the (\w+)", start)}
    after, permutations = [], []
    for move in moves:
        who = [word for word in re.findall(r"[A-Z]\w+", move) if word in names]
        if len(who) == 4 and len(set(who)) == 4:
            to = {who[0]: who[1], who[1]: who[0], who[2]: who[3], who[3]: who[2]}
        else:
            a, b, c = dict.fromkeys(who)
            to = {a: b, b: c, c: a}
        holder = {thing: to.get(person, person) for thing, person in holder.items()}
        after.append(dict(holder))
        permutations.append([names.index(to.get(name, name)) for name in names])
    return re.search(r"the (\w+) at", asked)[1], after, permutations


def sign(permutation):
    return sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :]) % 2


@pytest.mark.parametrize("phrasing", [0, 1])
@pytest.mark.parametrize("step", ["holder", "all"])
def test_steps_and_answers_are_what_happened_and_all_moves_are_even(step, phrasing):
    task = find_task(f"passing?moves=2-6&names={phrasing}&phrasing={phrasing}&step={step}", None, size=40)
    lengths = set()
    for problem in task.generated("train"):
        thing, after, permutations = followed(problem, NAMES[phrasing])
        assert problem["answer"] == [after[-1][thing]] and len(after) == len(problem["steps"])
        lengths.add(len(after))
        assert not any(map(sign, permutations))
        for number, (written, holder) in enumerate(zip(problem["steps"], after, strict=True), start=1):
            assert f"move {number}" in written and holder[thing] in written
            assert step == "all" or written.startswith(holder[thing])
            assert step == "holder" or all(f"{person} the {it}" in written for it, person in holder.items())
    assert lengths == {2, 3, 4, 5, 6}


def test_test_problems_are_others_and_answers_are_graded_by_name():
    task = find_task("passing?moves=3", None, size=50)
    train, test = ({one["question"] for one in load_problems(task, None, split)} for split in ("train", "test"))
    assert len(train & test) == 0
    (problem, *_) = load_problems(task, None, "test")
    gold = problem["answer"][0]
    assert task.is_right(problem, f" {gold}.") and not task.is_right(problem, "nobody")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *((f"moves={value}", f"moves must be N or N-M, .* not '{value}'") for value in ("0", "3-2", "x", "", "-1")),
        ("names=2", "names must be 0 or 1, not '2'"),
        ("step=none", "step must be holder or all, not 'none'"),
        ("asked=5", "asked must be a number from 0 to 4, not '5'"),
        ("colour=1", "unknown option 'colour'; the options are moves, names"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_values(option, message):
    with pytest.raises(InputError, match=message):
        find_task(f"passing?{option}", None)
