"""What HRPOConfig refuses."""

import pytest

from hrpo_patches import HRPOConfig
from hrpo_thinking.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "use_vllm=True cannot think"),
        (
            {"use_transformers_continuous_batching": True, "residual": "embedding"},
            "hands over no distribution, which the embedding residual is made from",
        ),
        (
            {"use_transformers_continuous_batching": True, "residual": None, "thoughts": 2},
            "forced thoughts of a run that does not think need generate",
        ),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' cannot think"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2 cannot think"),
        ({"residual": "both"}, "residual has to be"),
        ({"answer_start": ""}, "answer_start"),
    ],
)
def test_what_cannot_think_is_refused_in_one_sentence(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        HRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert "\n" not in str(error.value)


def test_none_is_plain_grpo_and_may_use_what_cannot_think(tmp_path):
    args = HRPOConfig(
        output_dir=str(tmp_path), residual="none", use_cpu=True, bf16=False, generation_kwargs={"num_beams": 2}
    )
    assert args.residual is None


def test_the_defaults_are_the_published_rates(tmp_path):
    args = HRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.learning_rates == {"gate": 1e-4, "Lambda": 1e-3, "projection": 1e-4}
    assert (args.residual, args.answer_start) == ("projection", "####")
