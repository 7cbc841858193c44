"""A model's own end of thinking, `</think>`, is the marker: in generate, in training, and where an answer is read."""

import pytest
import torch
from datasets import Dataset
from runs import config, lora
from tiny import byte_tokenizer, tiny_model

from hrpo_patches import HRPOTrainer
from hrpo_patches.engines import batches
from hrpo_patches.engines.batches import Decoding, completions
from hrpo_patches.tasks.problems import find_task
from hrpo_patches.tasks.rewards import answer_of, answer_reward
from hrpo_thinking.errors import InputError

MARKER = "</think>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def chat():
    """A tokenizer with Qwen3's tokens, one id each, and a chat template in its manner."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", MARKER, "\n\n7"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(chat):
    """A Qwen3 that thinks up to its own marker and prefers to say it, and then 7, and then to end."""
    thinking = {"answer_start": MARKER, "r_min": 0.5, "r_max": 0.9}
    return tiny_model("qwen3", vocab_size=len(chat), initializer_range=0.1, thinking=thinking)


def spoken(tokenizer):
    """A bias under which a completion is some words, the marker, 7 and the end."""
    end = tokenizer.eos_token_id
    marker, seven = tokenizer.convert_tokens_to_ids([MARKER, "\n\n7"])
    return [[[marker], 4.0], [[marker, seven], 30.0], [[seven, end], 30.0], [[marker, marker], -60.0]]


def test_thinking_ends_at_the_models_own_marker(model, chat):
    prompt = chat.apply_chat_template(
        [{"role": "user", "content": "3 + 4?"}], tokenize=False, add_generation_prompt=True
    )
    inputs = chat(prompt, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        tokenizer=chat,
        thinking=True,
        do_sample=True,
        num_return_sequences=8,
        max_new_tokens=12,
        sequence_bias=spoken(chat),
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    marker = chat.convert_tokens_to_ids(MARKER)
    answering = (tokens == marker).cumsum(1) > 0
    assert answering[:, :-1].any(1).sum() > 2 and out.thinking_mask.any()
    assert not (out.thinking_mask & answering).any()
    ended = (tokens == chat.eos_token_id).cumsum(1) > 0
    assert torch.equal(out.thinking_mask, ~answering & ~ended)


def test_a_run_rewards_the_answer_after_the_models_own_marker(model, chat, tmp_path):
    task = find_task("gsm8k", None)
    prompts = [[{"role": "user", "content": "3 + 4?"}], [{"role": "user", "content": "5 + 3?"}]]
    data = Dataset.from_dict(
        {"prompt": prompts * 8, "answer": ["#### 7", "#### 8"] * 8, "question": ["3 + 4?", "5 + 3?"] * 8}
    )
    options = {
        "answer_start": MARKER,
        "max_completion_length": 12,
        "generation_kwargs": {"sequence_bias": spoken(chat)},
    }
    trainer = HRPOTrainer(
        model,
        answer_reward(task, MARKER),
        config(tmp_path, beta=0.0, **options),
        data,
        processing_class=chat,
        peft_config=lora(),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    row = next(row for row in trainer.state.log_history if "reward" in row)
    assert row["marker_rate"] > 0.2 and 0 < row["reward"] < 1
    moved = [
        name for name, p in trainer.model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])
    ]
    assert any("thinking_projection" in name for name in moved)


def test_the_answer_is_read_after_the_models_own_marker(model, chat, monkeypatch):
    stock = batches.sampling_of

    def speaking(*given):
        config = stock(*given)
        config.sequence_bias = spoken(chat)
        return config

    monkeypatch.setattr(batches, "sampling_of", speaking)
    prompts = [[{"role": "user", "content": text}] for text in ("3 + 4?", "2 + 5?", "1 + 6?", "0 + 7?")]
    texts = completions(model, chat, prompts, Decoding(12, True))
    assert any(MARKER in text for text in texts)
    assert {answer_of(text, MARKER) for text in texts if MARKER in text} == {"7"}


def test_a_marker_that_no_reward_function_would_see_is_refused(model, chat, tmp_path):
    chat.add_special_tokens({"additional_special_tokens": [MARKER]})
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "3 + 4?"}]] * 8})
    with pytest.raises(InputError, match="'</think>' is a special token of this tokenizer"):
        HRPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            config(tmp_path, answer_start=MARKER),
            data,
            processing_class=chat,
            peft_config=lora(),
        )
