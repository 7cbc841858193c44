"""Least squares start the projection where a thought stands for the words that it replaces."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.training.lessons import Lesson, lesson_of
from hrpo_patches.training.start import STD, Place, fit_projection, places_of, states_of
from hrpo_thinking.errors import InputError


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_projection_that_can_be_found_is_found_up_to_its_scale(family):
    torch.manual_seed(0)
    model = tiny_model(family, thinking={})
    rows = [torch.randint(3, 60, (12,)).tolist() for _ in range(40)]
    states = torch.cat(states_of(model, rows))
    true = torch.randn(32, 32)
    tokens = list(range(100, 100 + 40 * 12))
    with torch.no_grad():  # as many embeddings as states, each the image of its state
        table = torch.nn.Embedding(700, 32)
        table.weight[100 : 100 + len(states)] = states @ true.T
        own = model.get_input_embeddings().weight.clone()
        table.weight[:100] = own[:100]
    model.set_input_embeddings(table)
    texts = [(row, [Place(j, [tokens[12 * i + j]], [1.0]) for j in range(12)]) for i, row in enumerate(rows)]
    left = fit_projection(model, texts)
    found = model.model.thinking_projection.weight
    assert left < 1e-3 and found.std().item() == pytest.approx(STD, rel=1e-3)
    scaled = found * (true.std() / found.std())
    assert (scaled - true).norm() / true.norm() < 0.1
    assert not model.model.thinking_projection.is_fresh()


def test_a_thought_stands_for_its_share_of_a_step_and_rare_words_count_most():
    tokenizer = byte_tokenizer()
    lessons = [lesson_of(tokenizer, [5, 6], steps, "1", "####") for steps in (["on a", "on b"], ["on c"])]
    (row, places), _ = places_of(lessons, 1)
    assert row == lessons[0].prompt + lessons[0].steps[0] + lessons[0].steps[1]
    assert [place.position for place in places] == [1, 1 + len(lessons[0].steps[0])]
    heaviest = [place.tokens[place.weights.index(max(place.weights))] for place in places]
    assert [tokenizer.decode([token]).strip() for token in heaviest] == ["a", "b"]


def test_as_many_thoughts_as_tokens_stand_for_the_next_token_each():
    lesson = Lesson([5, 6], [[7, 8, 9]], [1])
    ((row, places),) = places_of([lesson], 3)
    assert [(place.position, place.tokens) for place in places] == [(1, [7]), (2, [8]), (3, [9])]
    assert [row[place.position + 1] for place in places] == [7, 8, 9]


@pytest.mark.parametrize(
    ("thinking", "texts", "word"),
    [
        ({"projection_layers": 2}, [([5], [Place(0, [5], [1.0])])], "projection_layers"),
        ({}, [([5], [])], "at least one text"),
    ],
)
def test_what_cannot_be_fitted_is_refused(thinking, texts, word):
    with pytest.raises(InputError, match=word):
        fit_projection(tiny_model("llama", thinking=thinking), texts)


def test_states_are_read_under_autocast_where_training_is():
    model = tiny_model("llama", thinking={})
    dtypes = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *seen: dtypes.append(seen[-1].dtype))
    (exact,), (rounded,) = states_of(model, [[5, 6, 7]]), states_of(model, [[5, 6, 7]], bf16=True)
    handle.remove()
    assert dtypes == [torch.float32, torch.bfloat16] and rounded.dtype == torch.float32
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.05
