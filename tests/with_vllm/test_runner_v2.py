"""vLLM's second model runner, the one of GPUs, thinks as `generate` does, through preemption."""

import json
import os
import subprocess
import sys
from pathlib import Path

from engines import assert_same, big_enough, generated
from safetensors.torch import load_file

from hrpo_patches.models.checkpoint import mark

NEW = 32


def test_the_second_runner_says_and_thinks_what_generate_does_through_preemption(tokenizer, tmp_path):
    model = big_enough("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mark(tmp_path)  # without hrpo_patches in its process, the engine reads what the folder says
    prompts = [tokenizer(text)["input_ids"] for text in ("Hi", "What is 3 + 4?", "abc" * 12, "The sea")] * 3
    options = {"max_num_seqs": 12, "num_gpu_blocks_override": 10, "block_size": 32, "max_num_batched_tokens": 16}
    (tmp_path / "asked.json").write_text(json.dumps({"prompts": prompts, "new": NEW, "options": options}))
    probe = Path(__file__).with_name("v2_probe.py")
    done = subprocess.run([sys.executable, probe, tmp_path], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-3000:]
    said, states = json.loads((tmp_path / "said.json").read_text()), load_file(tmp_path / "said.safetensors")
    assert said["runner"].startswith("vllm.v1.worker.cpu.") or said["runner"].startswith("vllm.v1.worker.gpu.")
    for i, (ids, tokens, plain) in enumerate(zip(prompts, said["tokens"], said["plain"], strict=True)):
        assert_same((tokens, states[str(i)][:NEW]), generated(model, tokenizer, ids, new=NEW))
        assert plain == generated(model, tokenizer, ids, new=NEW, thinking=False)[0]
    assert said["counts"]["resumed"] > 0 and said["counts"]["replayed"] > 0 and said["counts"]["held"] == 0
