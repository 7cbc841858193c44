"""What an engine does, which imports transformers first: blends with a model's weights where nothing is patched."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaModel

from hrpo_thinking.blend import Blend
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import marker_table
from hrpo_thinking.modules import thinking_modules
from hrpo_thinking.parts import MODULES


class Backbone(Blend, torch.nn.Module):
    """An engine's own backbone."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, module in thinking_modules(config, ThinkingConfig.of(config)).items():
            self.add_module(name, module)


folder = Path(sys.argv[1])
backbone = Backbone(AutoConfig.from_pretrained(folder))
weights = load_file(folder / "model.safetensors")
own = {name.removeprefix("model."): value for name, value in weights.items() if name.split(".")[1] in MODULES}
backbone.load_state_dict(own)
inputs = load_file(folder / "inputs.safetensors")
blended = backbone.blend_thinking(inputs["embeds"], ThinkingInputs(inputs["states"], inputs["mask"]))
table = marker_table(AutoTokenizer.from_pretrained(folder), backbone.config.thinking["answer_start"])
save_file({"blended": blended, "table": table}, folder / "outputs.safetensors")

assert not any(name.split(".")[0] == "hrpo_patches" for name in sys.modules)
assert not hasattr(LlamaModel, "blend_thinking")
