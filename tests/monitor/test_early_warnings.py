"""Each fault that a log can show is said once, after it has lasted, and a healthy run is left in peace."""

import math
import re
from itertools import chain

import pytest

from hrpo_patches.monitor.early_warnings import EarlyWarnings

HEALTHY = {
    "loss": 0.1,
    "reward": 0.5,
    "marker_rate": 0.5,
    "kl": 0.01,
    "a/mean": 0.995,
    "learning_rate": 1e-4,
    "base/grad_norm": 1.0,
    "projection/grad_norm": 1.0,
    "projection/weight_norm": 1.0,
}
FAULTS = {
    "marker": {"marker_rate": 0.0, "reward": 0.0},
    "reward": {"reward": 0.0},
    "a_high": {"a/mean": 0.99999},
    "a_low": {"a/mean": 0.001},
    "no_gradient": {"projection/grad_norm": 0.0},
    "not_moving": {"projection/drift": 0.25},
    "kl": {"kl": 3.0},
    "gain": {"bptt/gain": 500.0},
    "overflow": {"grad_norm": math.inf},
}
REMEDY = {
    "marker": r"'####'.*worked example.*cut at 10 tokens",
    "reward": "easier problems",
    "a_high": "smaller residual_r_max",
    "a_low": "larger residual_r_min",
    "no_gradient": "loss replays hidden states",
    "not_moving": "optimizer holds it",
    "kl": "raise beta",
    "gain": r"500.*larger residual_r_min",
    "overflow": "clipping made every gradient zero.*Truncate",
}


def said(rows, start=0):
    warnings = EarlyWarnings("####", 10, start)
    return [warnings.read({"step": i, "projection/drift": i / 100, **row}) for i, row in enumerate(rows, start + 1)]


def test_a_supervised_batch_in_which_all_is_written_has_no_gradient_and_no_fault():
    quiet = {name: value for name, value in HEALTHY.items() if name != "a/mean"} | FAULTS["no_gradient"]
    assert not any(said([quiet | {"stage": 0}] * 60)) and flat(said([HEALTHY | FAULTS["no_gradient"]] * 60))


def test_thinking_that_collapses_is_said_and_short_thinking_is_not():
    long, short = [HEALTHY | {"thinking/length": 40.0}] * 10, [HEALTHY | {"thinking/length": 3.0}] * 10
    (text,) = flat(said([*long, *short]))
    assert "from 40 to 3.0 tokens" in text and not any(said(short)) and not any(said(long))


def flat(texts):
    return list(chain.from_iterable(texts))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_is_said_once_with_its_remedy(fault):
    texts = flat(said([HEALTHY | FAULTS[fault]] * 60))
    assert len(texts) == 1
    assert re.search(REMEDY[fault], texts[0])


def test_a_healthy_run_is_left_in_peace():
    assert not any(said([HEALTHY] * 60))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_no_fault(fault):
    assert not any(said(([HEALTHY] + [HEALTHY | FAULTS[fault]] * 4) * 10))


def test_a_fault_is_said_as_soon_as_it_has_lasted():
    for fault, rows in (("marker", 20), ("reward", 20), ("kl", 5), ("a_low", 5), ("no_gradient", 5)):
        texts = said([HEALTHY | FAULTS[fault]] * 30)
        assert [i for i, text in enumerate(texts, 1) if text] == [rows], fault
    texts = said([HEALTHY | FAULTS["reward"]] * 30, start=100)  # resumed
    assert [i for i, text in enumerate(texts, 1) if text] == [20]


def test_several_faults_are_each_said():
    row = HEALTHY | FAULTS["kl"] | FAULTS["a_high"] | FAULTS["reward"]
    assert len(flat(said([row] * 30))) == 3


def test_a_missing_marker_explains_the_reward():
    (text,) = flat(said([HEALTHY | FAULTS["marker"]] * 60))
    assert "answer marker" in text


def test_evaluations_and_plain_runs_are_no_faults():
    plain = {key: value for key, value in HEALTHY.items() if "/" not in key}
    assert not any(said([plain] * 60))
    assert not any(said([{"eval_loss": 1.0, "kl": 9.0, "marker_rate": 0.0}] * 60))
    unknown = EarlyWarnings("####")
    texts = flat(unknown.read({"step": i, "loss": 0.1} | FAULTS["marker"]) for i in range(30))
    assert "raise max_completion_length, or" in texts[0]


def test_a_step_that_cannot_move_at_a_learning_rate_of_zero_is_no_fault():
    assert not any(said([HEALTHY | FAULTS["not_moving"] | {"learning_rate": 0.0}] * 60))


def test_the_missing_marker_says_what_is_so_of_the_reward():
    (none,) = flat(said([HEALTHY | {"marker_rate": 0.0, "reward": 0.0}] * 30))
    (some,) = flat(said([HEALTHY | {"marker_rate": 0.0, "reward": 2.5}] * 30))
    assert "so every reward is 0" in none and "so thinking never ends" in some and "every reward" not in some


def test_a_trainer_without_rewards_misses_no_marker():
    row = {key: value for key, value in HEALTHY.items() if key != "reward"}
    assert not any(said([row | {"marker_rate": 0.0}] * 60))
