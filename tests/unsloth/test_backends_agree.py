"""The same checkpoint, the same inputs: unsloth's forward, decode and gradients against those of transformers."""

import pytest
import torch
from programs import HERE, python
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    """By backend, what probe.py computed in a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    for backend in ("transformers", "unsloth", "unpatched"):
        python(HERE / "probe.py", folder / backend, backend, checkpoints)
    return {backend: load_file(folder / backend) for backend in ("transformers", "unsloth", "unpatched")}


def of(results, backend, prefix):
    return {key: value for key, value in results[backend].items() if key.startswith(prefix)}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_and_states_with_thinking_are_those_of_transformers(results, family, mode):
    for kind in ("logits", "state"):
        ours, theirs = (results[backend][f"{family}.{mode}.{kind}"] for backend in ("unsloth", "transformers"))
        assert theirs.abs().max() > 1
        assert (ours - theirs).abs().max() < 1e-4


def test_a_loss_from_labels_sees_the_padding_mask_too(results, family):
    ours, theirs = (results[backend][f"{family}.train.loss"] for backend in ("unsloth", "transformers"))
    assert abs(ours - theirs) < 1e-4 and theirs > 1


def test_gradients_of_the_thinking_weights_are_those_of_transformers(results, family):
    ours, theirs = (of(results, backend, f"{family}.grad.") for backend in ("unsloth", "transformers"))
    assert len(ours) == len(theirs) == 6
    for name, value in theirs.items():
        assert value.norm() > 0, name
        assert (ours[name] - value).norm() / value.norm() < 1e-3, name


@pytest.mark.parametrize("batch", ["batch", "single"])
def test_greedy_thinking_completions_are_token_for_token_those_of_transformers(results, family, batch):
    ours, theirs = (of(results, backend, f"{family}.greedy.{batch}") for backend in ("unsloth", "transformers"))
    tokens, mask, states = (f"{family}.greedy.{batch}.{name}" for name in ("tokens", "mask", "states"))
    real = theirs[states].abs().sum(-1) > 0  # unsloth pads with the end token, transformers with the padding token
    assert torch.equal(ours[tokens][real], theirs[tokens][real]) and real.sum() > 10
    assert torch.equal(ours[mask], theirs[mask]) and theirs[mask].any()
    assert (ours[states] - theirs[states]).abs().max() < 1e-4


def test_without_thinking_unsloth_computes_bit_for_bit_what_it_does_unpatched(results, family):
    ours, theirs = (of(results, backend, f"{family}.plain.") for backend in ("unsloth", "unpatched"))
    assert ours.keys() == theirs.keys() and sum(".grad." in key for key in theirs) >= 21
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
