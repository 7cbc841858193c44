"""Run as a program: one backend computes on tiny checkpoints; what it saves is compared with another backend's.

    python probe.py OUT.safetensors transformers|unsloth|unpatched FOLDER [float32|bfloat16]

FOLDER holds llama/ and qwen2/ with thinking weights, and plain-llama/ and plain-qwen2/ without.
"""

import sys
from pathlib import Path

OUT, BACKEND, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if BACKEND != "unpatched":
    import hrpo_patches  # noqa: F401
if BACKEND != "transformers":
    import harness  # noqa: F401
import torch
from probes import FAMILIES, plain_results, thinking_results
from safetensors.torch import save_file
from transformers import AutoTokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = getattr(torch, sys.argv[4] if len(sys.argv) > 4 else "float32")
torch.use_deterministic_algorithms(DEVICE == "cuda", warn_only=True)  # bit for bit means nothing otherwise


def load(name):
    if BACKEND == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=DTYPE).to(DEVICE)
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(FOLDER / name), 256, DTYPE, load_in_4bit=False)
    return model


results = {}
for family in FAMILIES:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / family, padding_side="left")
    if BACKEND != "unpatched":
        results |= {f"{family}.{k}": v for k, v in thinking_results(load(family), tokenizer).items()}
    results |= {f"{family}.plain.{k}": v for k, v in plain_results(load(f"plain-{family}"), tokenizer).items()}
save_file({key: value.detach().contiguous().cpu().clone() for key, value in results.items()}, OUT)
