"""What version 0.1.0 wrote still loads, and thinks as it did.

`written_by_0_1_0/` holds, for each family, a base model, an adapter trained for two steps, the model that 0.1.0 merged
the two into, and that model loaded and saved again; and what the adapter greedily answered there.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hrpo_patches import load_adapter

FOLDER = Path(__file__).parents[1] / "written_by_0_1_0"


def opened(family, kind):
    if kind == "adapter":
        return load_adapter(
            AutoModelForCausalLM.from_pretrained(FOLDER / f"{family}-base"), FOLDER / f"{family}-adapter"
        )
    return AutoModelForCausalLM.from_pretrained(FOLDER / f"{family}-{kind}").eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_what_version_0_1_0_wrote_thinks_as_it_did(family, kind, tokenizer):
    expected = json.loads((FOLDER / f"{family}.json").read_text())
    inputs = tokenizer(expected["prompts"], return_tensors="pt", padding=True)
    model = opened(family, kind)
    out = model.generate(
        **inputs, tokenizer=tokenizer, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    assert out.sequences.tolist() == expected["sequences"]
    assert out.thinking_mask.long().tolist() == expected["thinking"]
    assert torch.allclose(out.thinking_states[0, 0], torch.tensor(expected["state"]), atol=1e-4)
