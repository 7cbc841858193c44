"""The maths and the marker belong to no engine: they work where transformers came first and nothing is patched."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model

from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import marker_table

PROBE = Path(__file__).parents[1] / "engine_probe.py"


def test_an_engine_without_the_patches_blends_bit_for_bit_as_the_patched_model(tmp_path):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embeds, states = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    save_file({"embeds": embeds, "states": states, "mask": mask}, tmp_path / "inputs.safetensors")
    subprocess.run([sys.executable, PROBE, tmp_path], check=True)
    outputs = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        blended = model.model.blend_thinking(embeds, ThinkingInputs(states, mask))
    assert torch.equal(outputs["blended"], blended)
    assert torch.equal((blended != embeds).any(-1)[:, -3:], mask)
    assert torch.equal(outputs["table"], marker_table(tokenizer, "####"))
