"""Each control replaces what it says and nothing else, in `generate` and in a replay."""

import pytest
import torch
from rollouts import completions, ragged, sample
from tiny import tiny_model

from hrpo_patches import replay_forward
from hrpo_patches.thinking.controls import CONTROLS, check_control, controlled, partners
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs

FELT = {"r_min": 0.3, "r_max": 0.6}
GOLDS = ["7", "7", "8", "9"]


@pytest.fixture(params=["projection", "embedding"])
def model(request):
    return tiny_model("llama", thinking=FELT | {"residual": request.param})


def seen(model, name, golds=GOLDS):
    """What one blend of four rows and two columns gives under a control; row 3 has stopped thinking in column 1."""
    torch.manual_seed(0)
    embeds, states = torch.randn(4, 2, 32), torch.randn(4, 2, 32)
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[3, 1] = False
    with controlled(model, name, golds):
        blended = model.model.blend_thinking(embeds, ThinkingInputs(states, mask))
    kind = model.config.thinking["residual"]
    residual = model.model.projected_residual(states) if kind == "projection" else states
    return blended, embeds, residual, mask, model.model.thinking_decay(embeds)


def gated(model, embeds, residual):
    return model.model.thinking_residual(embeds, residual)[0]


def test_zeroed_off_and_token_are_their_formulas(model):
    blended, embeds, _, mask, a = seen(model, "zeroed")
    assert torch.equal(blended[mask], (a * embeds)[mask]) and torch.equal(blended[3, 1], embeds[3, 1])
    blended, embeds, *_ = seen(model, "off")
    assert torch.equal(blended, embeds)
    blended, embeds, _, mask, _ = seen(model, "token")
    assert torch.equal(blended[mask], gated(model, embeds, embeds)[mask])
    blended, embeds, residual, mask, _ = seen(model, "live")
    assert torch.equal(blended[mask], gated(model, embeds, residual)[mask])


def test_the_mean_is_that_of_the_rows_that_still_think(model):
    blended, embeds, residual, mask, _ = seen(model, "mean")
    means = torch.stack([residual[:, 0].mean(0), residual[:3, 1].mean(0)])
    torch.testing.assert_close(blended[mask], gated(model, embeds, means.expand(4, 2, 32))[mask])


def test_swapped_rows_get_the_thought_of_a_row_that_thinks_and_has_another_gold_answer(model):
    blended, embeds, residual, mask, a = seen(model, "swapped")
    for row in range(4):  # in column 0 all think, so that each has a partner
        donors = [
            other
            for other in range(4)
            if torch.allclose(blended[row, 0], gated(model, embeds[row, 0], residual[other, 0]), atol=1e-6)
        ]
        assert len(donors) == 1 and GOLDS[donors[0]] != GOLDS[row]
    rows, donors = partners(mask[:, 1], torch.tensor([0, 0, 1, 2]))
    assert len(rows) == 2 and set(rows.tolist()) == set(donors.tolist()) and 3 not in rows  # two 7s, one 8 are left
    (alone,) = {0, 1, 2} - set(rows.tolist())
    torch.testing.assert_close(blended[alone, 1], (a * embeds)[alone, 1])


@pytest.mark.parametrize("groups", [[0, 1], [0, 0, 1, 1], [0, 1, 2, 0, 1], [2, 0, 1, 1, 0, 2, 2, 0]])
def test_partners_are_a_derangement_over_other_groups(groups):
    groups = torch.tensor(groups)
    rows, donors = partners(torch.ones(len(groups), dtype=torch.bool), groups)
    assert sorted(rows.tolist()) == sorted(donors.tolist()) == list(range(len(groups)))
    assert (groups[rows] != groups[donors]).all()


def test_nobody_thinks_and_nobody_is_swapped():
    rows, donors = partners(torch.zeros(3, dtype=torch.bool), torch.arange(3))
    assert len(rows) == len(donors) == 0


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in CONTROLS if name != "live"), ("qwen2", "swapped"), ("qwen3", "mean")],
)
def test_a_control_changes_a_rollout_and_is_replayed_by_all(family, tokenizer, name):
    model = tiny_model(family, thinking=FELT)
    inputs = ragged(tokenizer)
    live = sample(model, tokenizer, inputs, max_new_tokens=8, thoughts=4)
    with controlled(model, name, GOLDS):
        out = sample(model, tokenizer, inputs, max_new_tokens=8, thoughts=4)
        attention = torch.cat([inputs["attention_mask"], torch.ones_like(completions(out, inputs))], 1)
        replay = replay_forward(
            model, out.sequences, attention, thinking_mask=out.thinking_mask, bptt="sequential", logits_to_keep=9
        )
    assert model.model.thinking_control is None
    scores = torch.stack(out.scores, 1)
    assert (scores[:, 1] - torch.stack(live.scores, 1)[:, 1]).abs().max() > 1e-2
    biased = scores - replay.logits[:, :-1] / 0.7
    assert (biased[:, :, :50] - biased[:, :1, :1]).abs().max() < 1e-3  # the bias of three tokens is elsewhere


def test_what_a_control_needs_is_said_before_any_work():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="must be one of"):
        check_control("shuffled", [])
    for name in ("swapped", "mean"):
        with pytest.raises(InputError, match="a batch holds one"):
            check_control(name, [["1", "2"], ["3"]])
    with pytest.raises(InputError, match="more than half have the same"):
        check_control("swapped", [["1", "1", "2"]])
    with pytest.raises(InputError, match="for a batch of 4 rows"):
        seen(model, "swapped", ["1", "2"])
    assert model.model.thinking_control is None
