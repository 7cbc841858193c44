"""With span='thoughts' the forced thoughts alone think: in every engine, in the replay, and in training."""

import pytest
import torch
from runs import assert_all_thinking_parts_moved, small_trainer
from tiny import byte_tokenizer, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from hrpo_patches import replay_forward
from hrpo_thinking.errors import InputError

SPAN = {"span": "thoughts", "thoughts": 3, "r_min": 0.5, "r_max": 0.9}


def rolled_out(model, tokenizer, **more):
    prompt = tokenizer(["abc", "a"], return_tensors="pt", padding=True)
    options = {"thoughts": 3, "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True} | more
    return model.generate(**prompt, tokenizer=tokenizer, thinking=True, eos_token_id=-1, output_logits=True, **options)


def test_the_text_after_the_thoughts_is_that_of_a_plain_model_which_read_them(family):
    tokenizer, model = byte_tokenizer(), tiny_model(family, thinking=SPAN).eval()
    out = rolled_out(model, tokenizer)
    assert out.thinking_mask[:, :3].all() and not out.thinking_mask[:, 3:].any()
    everywhere = tiny_model(family, thinking=SPAN | {"span": "marker"}).eval()
    everywhere.load_state_dict(model.state_dict())
    assert rolled_out(everywhere, tokenizer).thinking_mask[:, 3:].any()
    given = {"thinking_states": out.thinking_states, "thinking_mask": out.thinking_mask}
    logits = replay_forward(model, out.sequences, out.attention_mask, **given).logits
    assert (logits[:, -10:-1] - torch.stack(out.logits, 1)).abs().max() < 1e-4


def test_continuous_batching_thinks_as_generate_does(family):
    tokenizer, model = byte_tokenizer(), tiny_model(family, thinking=SPAN).eval()
    out = rolled_out(model, tokenizer)
    options = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0, thoughts=3)
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    prompts = [tokenizer(text)["input_ids"] for text in ("abc", "a")]
    outputs = model.generate_batch(prompts, options, config, tokenizer=tokenizer, thinking=True, thoughts=3)
    for row, output in enumerate(outputs.values()):
        assert output.generated_tokens == out.sequences[row, -9:].tolist()
        assert output.thinking_mask.tolist() == [True] * 3 + [False] * 6


def test_training_moves_every_part_and_needs_thoughts(tmp_path):
    model = tiny_model("llama", thinking=SPAN)
    trainer = small_trainer(tmp_path / "run", model=model, thoughts=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_all_thinking_parts_moved(trainer, before)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["thinking/length"] == 0 and row["hidden_ratio"] > 0
    with pytest.raises(InputError, match="span='thoughts'"):
        small_trainer(tmp_path / "none", model=tiny_model("llama", thinking=SPAN), thoughts=0)
