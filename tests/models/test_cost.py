"""The cost table: counted by hand for a tiny model, and by the real thing."""

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import GPT2Config

from hrpo_patches.models.cost import costs, table_of
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import is_thinking_parameter

D = 32


@pytest.mark.parametrize(
    ("options", "parameters", "multiply_adds"),
    [
        ({}, D * D, D * D),
        ({"projection_norm": True}, D * D + 2 * D, D * D),
        ({"projection_layers": 2}, 2 * D * D, 2 * D * D),
        ({"projection_layers": 2, "projection_hidden": 48}, 2 * D * 48, 2 * D * 48),
    ],
)
def test_the_rows_are_what_a_pencil_gives(tmp_path, family, options, parameters, multiply_adds):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    base, projection, gate_r, gate_i, decay, embedding = costs(
        str(tmp_path / "config.json"), ThinkingConfig(**options)
    )
    assert (projection.parameters, projection.multiply_adds) == (parameters, multiply_adds)
    for gate in (gate_r, gate_i):
        assert (gate.parameters, gate.multiply_adds) == (D * D + D, D * D)
    assert (decay.parameters, decay.multiply_adds) == (D, 0)
    assert (embedding.parameters, embedding.multiply_adds) == (0, config.vocab_size * D)
    real = tiny_model(family)
    assert base.parameters == sum(p.numel() for name, p in real.named_parameters() if not is_thinking_parameter(name))
    layer = 2 * D * D + 2 * D * 16 + 3 * D * 64  # q and o, k and v with two heads of 8, the MLP of 64
    assert base.multiply_adds == 2 * layer + config.vocab_size * D


def test_no_weights_are_made(tmp_path, monkeypatch):
    tiny_config("llama", vocab_size=1000).save_pretrained(tmp_path)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    costs(str(tmp_path), ThinkingConfig())
    assert made and not any(t.numel() > 1000 and t.device.type != "meta" for t in made)


def test_the_table_has_a_row_for_each_and_two_sums(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    rows = costs(str(tmp_path), ThinkingConfig())
    table = table_of(rows, "tiny")
    names = list(table.columns[0].cells)
    assert names == [row.name for row in rows] + ["all, projection", "all, embedding residual"]
    assert list(table.columns[1].cells)[-2] == f"{sum(row.parameters for row in rows[1:-1]):,}"


def test_another_family_is_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a gpt2 model"):
        costs(str(tmp_path), ThinkingConfig())


def test_a_merged_model_has_the_projection_that_it_was_trained_with(tmp_path):
    config = tiny_config("llama")
    kind = ThinkingConfig(projection_layers=2, projection_norm=True)
    config.thinking = kind.to_dict() | {"in_checkpoint": True}
    config.save_pretrained(tmp_path)
    row = next(row for row in costs(str(tmp_path), ThinkingConfig()) if row.name == "thinking_projection")
    assert row.parameters == 2 * 32 * 32 + 64
    with pytest.raises(InputError, match="were trained with projection_norm=True, not False"):
        costs(str(tmp_path), ThinkingConfig(projection_layers=2))
