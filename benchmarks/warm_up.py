"""Teaches a small model to write worked solutions with the answer marker, by supervised fine-tuning, before GRPO.

A model that never writes the marker has no reward to learn from. What comes out is a plain model, to be trained by
`scripts/hrpo_gsm8k.py --model_name OUT`, with the same --prompt, and compared by compare.py.
"""

import argparse
import re
import sys
from pathlib import Path

import hrpo_patches  # noqa: F401 - before transformers

# isort: split
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hrpo_patches.commands.main import said
from hrpo_patches.models.base import load_model
from hrpo_patches.tasks.gsm8k import GOLD_MARKER, TASK
from hrpo_patches.tasks.prompts import prompt_ids, prompt_of, uses_chat
from hrpo_patches.tasks.sources import rows_of
from hrpo_thinking.errors import InputError

CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's notes for a calculator, which no prompt of ours asks for


def lesson(row, where, tokenizer, chat):
    """A row of GSM8K's form: the tokens of the prompt of training and of its solution, which alone is learned."""
    problem = TASK.read(row, where)
    if GOLD_MARKER not in str(row["answer"]):
        raise InputError(f"{where} has no worked solution with {GOLD_MARKER} before its answer.")
    prompt = prompt_ids(tokenizer, prompt_of(TASK, problem["question"], GOLD_MARKER, [], chat))
    solution = tokenizer(CALCULATION.sub("", row["answer"]).strip(), add_special_tokens=False)["input_ids"]
    solution.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + solution, "labels": [-100] * len(prompt) + solution}


def main(flags=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name", default="smollm2-135m", help="what is taught")
    parser.add_argument("--dataset", default="openai/gsm8k:main@train", help="worked solutions in GSM8K's columns")
    parser.add_argument("--prompt", default="auto", choices=("auto", "chat", "plain"), help="as in the scripts")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of all weights")
    parser.add_argument("--batch_size", type=int, default=16, help="solutions in one step")
    parser.add_argument("--max_steps", type=int, default=-1, help="optimizer steps; -1 goes through the data once")
    parser.add_argument("--seed", type=int, default=42, help="of the data's order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; must not exist")
    args = parser.parse_args(flags)
    if args.out.exists():
        parser.error(f"{args.out} exists already; give another --out.")
    model, tokenizer = load_model(args.model_name, None, dtype=torch.float32)
    chat = uses_chat(args.prompt, tokenizer)
    lessons = [lesson(row, where, tokenizer, chat) for row, where in rows_of(args.dataset, "train")]
    if not lessons:
        raise InputError(f"the data set {args.dataset} has no rows.")
    options = TrainingArguments(
        output_dir=str(args.out),
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.max_steps,
        num_train_epochs=1,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        seed=args.seed,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, options, collator, train_dataset=lessons, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    sys.exit(said(main))
