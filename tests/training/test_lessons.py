"""Written steps become forced thoughts, and only what is still written is learned."""

import pytest
import torch
from tiny import byte_tokenizer

from hrpo_patches.training.lessons import IGNORED, Classroom, lesson_of
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import thinking_table

STEPS = [["ab", "c", "de"], ["f"]]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def classroom(tokenizer, span="thoughts", per_step=2):
    table = thinking_table(tokenizer, ThinkingConfig(span=span))
    return Classroom(tokenizer.get_vocab()["."], per_step, tokenizer.pad_token_id, table)


def lessons(tokenizer):
    return [lesson_of(tokenizer, [5] * (2 + i), steps, "9", "####") for i, steps in enumerate(STEPS)]


def learned(tokenizer, batch, row):
    return tokenizer.decode([token for token in batch.labels[row].tolist() if token != IGNORED])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_steps_are_thoughts_and_the_rest_is_learned(tokenizer, stage):
    batch = classroom(tokenizer).batch(lessons(tokenizer), stage)
    for row, steps in enumerate(STEPS):
        written = "".join(f"{step}\n" for step in steps[stage:])
        assert learned(tokenizer, batch, row) == f"{written}#### 9<end>"
        ids = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        assert ids[: 2 + row] == [5] * (2 + row)
        assert tokenizer.decode(ids[2 + row :]) == "." * (2 * stage) + f"{written}#### 9<end>"
        assert batch.thinking[row].sum() == 2 * stage and batch.thinking[row, : 2 * stage].all()
        first = f"{steps[stage]}\n" if stage < len(steps) else "#### 9<end>"
        assert tokenizer.decode(batch.labels[row][batch.following[row]].tolist()) == first
    assert batch.input_ids.shape[1] == 3 + batch.width


def test_with_the_span_of_the_marker_written_steps_think_too(tokenizer):
    batch = classroom(tokenizer, "marker").batch(lessons(tokenizer), 1)
    text = [tokenizer.decode([token]) for token in batch.input_ids[0, -batch.width :].tolist()]
    thinks = [one for one, thinking in zip(text, batch.thinking[0].tolist(), strict=True) if thinking]
    assert "".join(thinks).startswith("..c\nde\n") and "9" not in thinks


def test_nothing_thinks_where_there_is_no_table(tokenizer):
    room = Classroom(7, 1, 0, None)
    assert not room.batch(lessons(tokenizer), 2).thinking.any()


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end token"):
        lesson_of(tokenizer, [1], ["a"], "1", "####")


def test_labels_are_the_tokens_that_follow(tokenizer):
    batch = classroom(tokenizer).batch(lessons(tokenizer), 1)
    own = batch.input_ids[:, -batch.width :]
    kept = batch.labels != IGNORED
    assert torch.equal(batch.labels[kept], own[kept])
