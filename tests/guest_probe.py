"""Run as a program: what plain models look like in memory and on disk, with or without hrpo_patches."""

import json
import sys
from dataclasses import fields
from pathlib import Path

if sys.argv[2] == "patched":
    import hrpo_patches  # noqa: F401

import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
INTERN = InternVLVisionConfig(**VISION, image_size=[16, 16], patch_size=[8, 8])
CONFIGS = {
    **{kind: config(**SMALL) for kind, (config, _) in FAMILIES.items()},
    "llava": LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=CLIP, image_token_index=99),
    "internvl": InternVLConfig(text_config=Qwen2Config(**SMALL), vision_config=INTERN, image_token_id=99),
}

folder, seen = Path(sys.argv[1]), {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if name in ("llava", "internvl") else AutoModelForCausalLM
    model = auto.from_config(config)
    model.save_pretrained(folder / name)
    again = auto.from_pretrained(folder / name)
    again.save_pretrained(folder / f"{name}-again")
    seen[name] = {
        "weights": [f"{key} {value.dtype}" for key, value in model.state_dict().items()],
        "modules": [f"{path} {type(module).__name__}" for path, module in model.named_modules()],
        "own": sorted(vars(model)) + sorted(vars(model.model)) + sorted(vars(config)),
        "float32": [str(model._keep_in_fp32_modules), str(model._keep_in_fp32_modules_strict)],
    }
    adapted = get_peft_model(again, LoraConfig(target_modules="all-linear"))
    seen[name]["adapted"] = [path for path, _ in adapted.named_parameters() if "lora_" in path]
plain = AutoModelForCausalLM.from_config(CONFIGS["llama"])
out = plain.generate(torch.tensor([[1, 2]]), max_new_tokens=2, return_dict_in_generate=True)
torch.save(
    [plain(torch.tensor([[1, 2]])).to_tuple()[0], plain(torch.tensor([[1, 2]]), use_cache=False), out],
    folder / "outputs.pt",
)
seen["outputs"] = [[field.name for field in fields(kind)] for kind in (CausalLMOutputWithPast, type(out))]
seen["outputs"].append([type(plain(torch.tensor([[1, 2]]))).__name__, type(out).__name__])
seen["generation"] = sorted(GenerationConfig().to_dict()) + sorted(plain.generation_config.to_dict())
(folder / "seen.json").write_text(json.dumps(seen))
