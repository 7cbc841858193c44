"""The marker automaton against what the text says."""

import random

import pytest
from tiny import HASHES, byte_tokenizer

from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table


def answering(tokenizer, marker, ids):
    """For each token, whether the automaton has seen the marker by then."""
    table, state, seen = marker_table(tokenizer, marker), 0, []
    for i in ids:
        state = int(table[i, state])
        seen.append(state == table.shape[1] - 1)
    return seen


def texts(tokenizer, ids):
    return [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]


@pytest.mark.parametrize("marker", ["####", "###", "##a#", "aba", "aabaaab", "é#", " ####", "</think>"])
def test_it_agrees_with_the_text_on_random_token_sequences(tokenizer, marker):
    chosen = [*HASHES, *"#ab72", "Ġ", "Ċ"]
    vocabulary = tokenizer.convert_tokens_to_ids(chosen) + 8 * tokenizer(marker)["input_ids"]
    rng, found = random.Random(0), 0
    for _ in range(300):
        ids = rng.choices(vocabulary, k=12)
        expected = [marker in text for text in texts(tokenizer, ids)]
        assert answering(tokenizer, marker, ids) == expected, tokenizer.convert_ids_to_tokens(ids)
        found += expected[-1]
    assert found or len(marker) > 5


@pytest.mark.parametrize(
    ("tokens", "position"),
    [
        (["a", "####", "7"], 1),
        (["a", "Ġ####", "7"], 1),
        (["###", "#72"], 1),
        (["#####"], 0),
        (["#", "#", "#", "#"], 3),
        (["##", "a#", "#b", "###"], None),
        (["a####b"], 0),
        (["###", "b", "#7"], None),
    ],
)
def test_split_and_glued_markers_are_found_where_they_end(tokenizer, tokens, position):
    seen = answering(tokenizer, "####", tokenizer.convert_tokens_to_ids(tokens))
    assert seen == [position is not None and i >= position for i in range(len(tokens))]


def test_a_marker_that_the_tokenizer_cannot_spell_is_refused():
    tokenizer = byte_tokenizer()
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if "#" not in token}

    class WithoutHash(type(tokenizer)):
        def get_vocab(self):
            return vocabulary

    without = WithoutHash(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    with pytest.raises(InputError, match="spells the answer marker '####'"):
        marker_table(without, "####")


def test_padding_rows_of_a_larger_vocabulary_read_as_other_text(tokenizer):
    table = marker_table(tokenizer, "####", 1000)
    assert table.shape == (1000, 5)
    assert table[999].tolist() == [0, 0, 0, 0, 4]


def test_the_table_is_made_once_for_a_tokenizer(tokenizer):
    assert marker_table(tokenizer, "####") is marker_table(tokenizer, "####")


@pytest.mark.smollm2
def test_it_agrees_with_the_text_on_a_real_tokenizer(smollm2):
    tokenizer = smollm2[1]
    rng, hashes = random.Random(1), [i for token, i in tokenizer.get_vocab().items() if "#" in token]
    everything = list(range(len(tokenizer)))
    for _ in range(200):
        ids = [rng.choice(hashes if rng.random() < 0.6 else everything) for _ in range(8)]
        expected = ["####" in text for text in texts(tokenizer, ids)]
        assert answering(tokenizer, "####", ids) == expected, tokenizer.convert_ids_to_tokens(ids)
