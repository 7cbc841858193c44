"""Run as a program: computes with tiny models, with or without hrpo_patches, and saves every result for comparison."""

import sys

if sys.argv[2] == "patched":
    import hrpo_patches  # noqa: F401

import torch
from safetensors.torch import save_file
from tiny import FAMILIES, byte_tokenizer, tiny_model

tokenizer, results = byte_tokenizer(), {}
inputs = tokenizer(["Hi", "What is 3 + 4?", "####"], return_tensors="pt", padding=True)
for family in FAMILIES:
    model = tiny_model(family, thinking=None)
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    results |= {f"{family}.logits": out.logits.detach(), f"{family}.loss": out.loss.detach()}
    results[f"{family}.outputs"] = torch.tensor(list("|".join(out.keys()).encode()))
    results |= {f"{family}.grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, options in {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.7},
        "beams": {"num_beams": 2},
        "static": {"do_sample": False, "cache_implementation": "static"},
        "returned": {"do_sample": True, "num_return_sequences": 2},
    }.items():
        torch.manual_seed(0)
        generated = model.generate(
            **inputs, max_new_tokens=10, return_dict_in_generate=True, output_logits=True, **options
        )
        results[f"{family}.{name}"] = generated.sequences
        results[f"{family}.{name}.logits"] = torch.stack(generated.logits)
        results[f"{family}.{name}.outputs"] = torch.tensor(list("|".join(generated.keys()).encode()))
save_file({key: value.contiguous().clone() for key, value in results.items()}, sys.argv[1])
