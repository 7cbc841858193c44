"""The memory that a step of training really takes: python tests/memory_probe.py FOLDER SHAPES (JSON of Shapes).

FOLDER holds a config. Prints the bytes by which the process grew at most, from before it had a model.
"""

import json
import re
import sys
from pathlib import Path

import hrpo_patches  # noqa: F401  before transformers

# isort: split
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hrpo_patches import HRPOConfig, HRPOTrainer


def status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(folder, shapes):
    tokenizer, shapes = byte_tokenizer(), json.loads(shapes)
    dtype = getattr(torch, shapes.pop("dtype"))
    length, rank = shapes.pop("max_prompt_length"), shapes.pop("lora_rank")
    args = HRPOConfig(
        f"{folder}/run",
        max_steps=1,
        num_generations=shapes["per_device_train_batch_size"],
        use_cpu=True,
        bf16=dtype == torch.bfloat16,
        report_to="none",
        monitor=False,
        beta=0.0,
        answer_start="\n\n\n\n",
        generation_kwargs={"min_new_tokens": shapes["max_completion_length"]},
        save_strategy="no",
        **shapes,
    )
    data = Dataset.from_dict({"prompt": ["x" * length] * 8})
    (torch.ones(512, 512, dtype=dtype) @ torch.ones(512, 512, dtype=dtype)).sum()  # threads and kernels
    before = status("VmRSS")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    trainer = HRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args,
        data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, target_modules="all-linear"),
    )
    trainer.train()
    print(json.dumps({"grown": status("VmHWM") - before, "terms": trainer.state.log_history[0].get("bptt/terms")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
