"""What unsloth's patched forward asks of us, without unsloth."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from torch import nn

from hrpo_patches.models.unsloth_forward import is_thinking_module, take_thinking
from hrpo_patches.thinking.backbone import patched_backbone
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES, Family, check_unsloth
from hrpo_thinking.inputs import Bptt, ThinkingInputs

INPUTS = ThinkingInputs(torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.bool), "projection")


def test_thinking_is_taken_out_of_the_keywords_that_every_layer_would_get():
    backbone = tiny_model("llama").model
    kwargs = {"thinking_inputs": INPUTS, "n_items": 3}
    assert take_thinking(backbone, kwargs, 4) is INPUTS
    assert kwargs == {"n_items": 3}
    assert take_thinking(backbone, kwargs, 4) is None
    assert take_thinking(nn.Linear(1, 1), {"n_items": 3}, 4) is None


def test_another_family_and_an_input_that_would_be_cut_are_refused():
    kwargs = {"thinking_inputs": INPUTS}
    with pytest.raises(InputError, match="Linear cannot think"):
        take_thinking(nn.Linear(1, 1), dict(kwargs), 4)
    backbone = tiny_model("llama").model
    backbone.max_seq_length = 3
    with pytest.raises(InputError, match="4 positions.*max_seq_length=3"):
        take_thinking(backbone, dict(kwargs), 4)
    with pytest.raises(InputError, match="since version 0.3"):
        take_thinking(backbone, {"thinking_states": INPUTS.states, "thinking_mask": INPUTS.mask}, 3)
    for deep in (replace(INPUTS, bptt=Bptt("exact")), replace(INPUTS, states=None)):
        with pytest.raises(InputError, match="unsloth's backward overwrites"):
            take_thinking(backbone, {"thinking_inputs": deep}, 3)


def test_a_family_whose_forward_in_unsloth_has_no_diffs_is_refused_there_alone(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setitem(FAMILIES, "llama", Family("Llama"))
    assert patched_backbone(model) is model.model
    with pytest.raises(InputError, match="thinking Llama models are not supported in unsloth, only Qwen2 or Qwen3"):
        check_unsloth("llama")

    class Fast(type(model)):
        def forward(self, *args, **kwargs): ...

    Fast.forward.__module__ = "unsloth.models.llama"
    model.__class__ = Fast
    with pytest.raises(InputError, match="not supported in unsloth"):
        patched_backbone(model)
    monkeypatch.undo()
    assert patched_backbone(model) is model.model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("thinking_projection", True),
        ("model.thinking_residual_Lambda", True),
        ("foo.thinking_projection", False),
        ("projection", False),
        ("lm_head", False),
        (("thinking_projection",), False),
    ],
)
def test_a_thinking_module_is_one_that_the_model_has(name, expected):
    assert is_thinking_module(name, tiny_model("llama")) == expected
    assert not is_thinking_module(name, tiny_model("llama", thinking=False))
