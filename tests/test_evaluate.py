"""Greedy answers in the prompts' order, and an accuracy with its standard error."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.evaluate import Accuracy, accuracy, greedy_completions
from hrpo_patches.tasks import task_named


def test_batches_sorted_by_length_change_no_answer():
    model, tokenizer = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}), byte_tokenizer()
    prompts = ["What is 3 + 4?", "Hi", "abc", "Say #### once", "x"]
    model.train()
    alone = [greedy_completions(model, tokenizer, [p], 8, thinking=True)[0] for p in prompts]
    assert greedy_completions(model, tokenizer, prompts, 8, thinking=True, batch_size=2) == alone
    assert greedy_completions(model, tokenizer, prompts, 8, thinking=False) != alone
    assert model.training and torch.is_grad_enabled()


def test_accuracy_and_its_standard_error():
    problems = [{"question": "?", "answer": [gold]} for gold in ("1", "2", "3", "5")]
    result = accuracy(task_named("gsm8k"), problems, ["#### 1", "#### 2", "3", "#### 4"], "####")
    assert (result.right, result.total, result.mean) == (2, 4, 0.5)
    assert result.standard_error == pytest.approx(0.25)
    assert str(Accuracy(91, 200)) == "0.455 ± 0.035 (91 of 200)"
