"""Every option of GRPOConfig does in a run that thinks what the tables of grpo_options.py say."""

from dataclasses import fields
from pathlib import Path

import pytest
from grpo_options import EFFECTS, ELSEWHERE, HELD, NO_EFFECT, REFUSED, UNTRIED, differs, run, trainer_of
from packaging.version import Version
from trl import GRPOConfig
from trl import __version__ as trl_version

pytestmark = pytest.mark.skipif(Version(trl_version) < Version("1.16"), reason="the tables are of TRL 1.16")
TESTS = Path(__file__).parents[1]
TABLES = (EFFECTS, HELD, REFUSED, NO_EFFECT, ELSEWHERE, UNTRIED)


def test_every_option_is_in_one_table():
    options = [one.name for one in fields(GRPOConfig) if one.init]
    listed = [name for table in TABLES for name in table]
    assert sorted(listed) == sorted(options)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What is seen of a run with some options; each kind of run is made once."""
    runs = {}

    def of(options, again=False):
        key = str(sorted(options.items()))
        if again or key not in runs:
            runs[key] = run(tmp_path_factory.mktemp("option") / "run", **options)
        return runs[key]

    return of


def test_two_runs_with_the_same_options_are_the_same(seen):
    assert not differs(seen({}), seen({}, again=True))


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_has_an_effect(seen, name):
    value, others = EFFECTS[name]
    assert differs(seen(others)[0], seen(others | {name: value})[0])


@pytest.mark.parametrize("name", HELD)
def test_an_option_reaches_what_it_is_for(seen, name):
    value, others = HELD[name]
    one, other = seen(others), seen(others | {name: value})
    assert one[1] != other[1]


def without_effect():
    """The options without effect, those with the same ones beside them together; two that exclude each other apart."""
    groups = {}
    for name, (_, others, _) in NO_EFFECT.items():
        groups.setdefault((str(others), name == "fp16_full_eval"), []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("names", without_effect(), ids=lambda names: names[0])
def test_options_without_effect_change_nothing(seen, names):
    others = NO_EFFECT[names[0]][1]
    one, other = seen(others), seen(others | {name: NO_EFFECT[name][0] for name in names})
    assert not differs(one, other)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_is_refused(tmp_path, name):
    value, others, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(tmp_path, **others, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_option_is_shown_in_a_test_of_its_own(name):
    file, _, test = ELSEWHERE[name].partition("::")
    text = (TESTS / file).read_text()
    assert name in text and f"def {test}(" in text if test else name in text
