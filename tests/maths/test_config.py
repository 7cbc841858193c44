"""What ThinkingConfig takes and refuses."""

import pytest
from tiny import tiny_model

from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r_min": 0.999, "r_max": 0.99}, "r_min < r_max"),
        ({"r_min": 0.99, "r_max": 0.99}, "r_min < r_max"),
        ({"r_min": 0.0, "r_max": 0.99}, "r_min < r_max"),
        ({"r_min": 0.99, "r_max": 1.0}, "r_min < r_max"),
        ({"residual": "both"}, "residual must be"),
        ({"answer_start": ""}, "non-empty"),
        ({"init_std": 0.0}, "init_std"),
        ({"init_std": None}, "init_std must be a finite number, not None"),
        ({"init_std": float("inf")}, "init_std must be a finite number"),
        ({"r_min": "0.5"}, "r_min must be a finite number, not '0.5'"),
        ({"projection_dropout": "0.1"}, "projection_dropout must be a finite number"),
        ({"projection_layers": True}, "projection_layers must be a whole number, not True"),
        ({"projection_layers": 2, "projection_hidden": 2.5}, "projection_hidden must be a whole number"),
        ({"embedding_norm": float("nan")}, "embedding_norm must be a finite number"),
        ({"answer_starts": "####"}, "unknown thinking option 'answer_starts'"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(values, message):
    with pytest.raises(InputError, match=message):
        ThinkingConfig.from_dict(values)
    with pytest.raises(InputError, match=message):
        tiny_model("llama", thinking=values)


def test_the_config_is_kept_as_a_dict_of_plain_values():
    model = tiny_model("llama", thinking={"residual": "embedding"})
    assert model.config.thinking == ThinkingConfig(residual="embedding").to_dict()
    assert ThinkingConfig.of(model.config) == ThinkingConfig(residual="embedding")
