"""Answers problems greedily and grades them; knows models and text, nothing of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.rewards import grade
from hrpo_patches.tasks import Problem, Task

Prompt = str | list[dict[str, str]]


@dataclass
class Accuracy:
    """`right` of `total` problems."""

    right: int
    total: int

    @property
    def mean(self) -> float:
        """The share of right answers."""
        return self.right / self.total

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n)."""
        return math.sqrt(self.mean * (1 - self.mean) / self.total)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f} ({self.right} of {self.total})"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, a plain text or a conversation, as the trainer makes them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


@torch.no_grad()
def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    max_new_tokens: int,
    thinking: bool,
    batch_size: int = 50,
    title: str = "Answering",
) -> list[str]:
    """The model's greedy completion of each prompt, without special tokens, in the prompts' order.

    Args:
        model, tokenizer: the tokenizer has to pad on the left.
        prompts: texts or conversations. Similar lengths are answered together.
        max_new_tokens: where a completion is cut.
        thinking: whether the model thinks.
        batch_size: prompts answered at once.
        title: of the progress bar.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts = [""] * len(ids)
    was_training = model.training
    model.eval()
    extra: dict[str, Any] = {"tokenizer": tokenizer} if thinking else {}
    for batch in track(batches, description=title):
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(model.device)
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            thinking=thinking,
            **extra,
        )
        completions = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, completions, strict=True):
            texts[i] = text
    model.train(was_training)
    return texts


def accuracy(task: Task, problems: Sequence[Problem], completions: list[str], marker: str) -> Accuracy:
    """How many completions the reward finds right."""
    verdicts = [grade(task, problem, text, marker) for problem, text in zip(problems, completions, strict=True)]
    return Accuracy(int(sum(verdicts)), len(verdicts))
