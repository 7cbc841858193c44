"""A model with random weights of Qwen2.5-1.5B's shape, with a tokenizer of bytes, and problems for it, in a folder.

PYTHONPATH=tests python tests/gpu/model.py OUT [--tiny]
"""

import json
import sys
from pathlib import Path

import hrpo_patches  # noqa: F401  before transformers

# isort: split
import torch
from tiny import byte_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

LARGE = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
LARGE |= {"num_attention_heads": 12, "num_key_value_heads": 2}
TINY = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def main(out, *words):
    folder, tiny = Path(out), "--tiny" in words
    tokenizer = byte_tokenizer()
    own = {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**own | (TINY if tiny else LARGE)), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a in range(20) for b in range(20)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
