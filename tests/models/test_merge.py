"""A merged model is the adapter's, in a new process too, and nobody loads it by accident without its thinking."""

import json
import subprocess
import sys

import processes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rollouts import completions, ragged, sample
from runs import lora, small_trainer
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from hrpo_patches import load_adapter, replay_forward
from hrpo_patches.commands.main import main
from hrpo_patches.models.merge import convert, merge
from hrpo_patches.models.record import save_thinking
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import is_thinking_parameter, parts_of

GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "biased": False}
IN_A_NEW_PROCESS = """
import hrpo_patches, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from rollouts import ragged
from safetensors.torch import load_file, save_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
logits = hrpo_patches.replay_forward(model, **load_file(sys.argv[2])).logits
out = model.generate(**ragged(tokenizer), tokenizer=tokenizer, max_new_tokens=24, do_sample=False,
                     return_dict_in_generate=True)  # thinking is its default
save_file({"logits": logits, "mask": out.thinking_mask, "first": out.thinking_states[:, 0].contiguous()}, sys.argv[3])
"""


def relative(found, expected):
    """The norm of the difference over the norm."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def family():
    return "llama"


@pytest.fixture
def residual():
    return "projection"


@pytest.fixture
def folders(tmp_path, family, residual):
    """A stock base and an adapter on it, each in its folder; the adapter's model."""
    model = tiny_model(family, thinking=False)
    model.config.thinking = None
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    thinking = {"residual": residual, "answer_start": "#7", "r_min": 0.3, "r_max": 0.6}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", thinking=thinking)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=parts_of(residual))
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    save_thinking(model, tmp_path / "adapter")
    return tmp_path, model


@pytest.mark.parametrize(
    ("family", "residual"),
    [("llama", "projection"), ("llama", "embedding"), ("qwen2", "projection"), ("qwen3", "embedding")],
)
def test_a_merged_model_gives_the_adapters_logits_in_a_new_process_and_thinks(folders, residual):
    folder, model = folders
    assert main(["merge", str(folder / "adapter"), str(folder / "merged")]) == 0
    inputs = ragged(byte_tokenizer())
    out = sample(model, byte_tokenizer(), inputs, **GREEDY)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(completions(out, inputs))], 1)
    # W + BA in one matrix rounds otherwise than in two; fed back from step to step, that would grow without bound.
    given = {"input_ids": out.sequences, "attention_mask": mask, "thinking_mask": out.thinking_mask}
    given["thinking_states"] = out.thinking_states
    save_file(given, folder / "given")
    done = processes.run(IN_A_NEW_PROCESS, folder / "merged", folder / "given", folder / "out")
    assert done.returncode == 0, done.stderr
    found = load_file(folder / "out")
    with torch.no_grad():
        expected = replay_forward(model, **given).logits
        without = model(out.sequences, attention_mask=mask).logits
    assert relative(found["logits"], expected) < 1e-5 < 1e-2 < relative(without, expected)
    assert found["mask"].any()
    assert relative(found["first"], out.thinking_states[:, 0]) < 1e-5
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["thinking"]["answer_start"] == "#7" and config["thinking"]["residual"] == residual


def test_without_hrpo_patches_a_merged_model_is_an_error_that_names_it(folders):
    folder, _ = folders
    merge(folder / "adapter", folder / "merged")
    load = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", load, folder / "merged"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "import hrpo_patches" in done.stderr.strip().splitlines()[0] + done.stderr
    assert "ValueError" in done.stderr


def test_a_bf16_base_stays_bf16_and_the_thinking_weights_float32(folders):
    folder, _ = folders
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, thinking=False)
    base.save_pretrained(folder / "bf16")
    byte_tokenizer().save_pretrained(folder / "bf16")
    merge(folder / "adapter", folder / "merged", base=str(folder / "bf16"))
    weights = load_file(folder / "merged" / "model.safetensors")
    assert sum(map(is_thinking_parameter, weights)) == 6
    for name, value in weights.items():
        assert value.dtype == (torch.float32 if is_thinking_parameter(name) else torch.bfloat16), name


def test_a_lora_bias_without_a_place_is_a_sentence(tmp_path):
    base = tiny_model("llama", thinking=False)
    base.config.thinking = None
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    trainer = small_trainer(tmp_path / "run", model=str(tmp_path / "base"), peft_config=lora(lora_bias=True))
    trainer.save_model()
    with pytest.raises(InputError, match="bias for .*q_proj, which has none to merge it into"):
        merge(tmp_path / "run", tmp_path / "merged")


def test_nothing_is_overwritten_and_nothing_is_left_half_written(folders):
    folder, _ = folders
    (folder / "taken").mkdir()
    for refused in (lambda: merge(folder / "adapter", folder / "taken"), lambda: convert(folder, folder, "embedding")):
        with pytest.raises(InputError, match="exists already|holds no adapter"):
            refused()
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="adapter_model.safetensors is missing"):
        merge(folder / "adapter", folder / "merged")
    for file in (folder / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="nor .* has a tokenizer"):
        merge(folder / "adapter", folder / "merged")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "taken"]


@pytest.fixture
def published(folders):
    """The adapter as published ones are: no word of how it thinks, and half precision."""
    folder, model = folders
    old = folder / "old"
    model.save_pretrained(old)
    weights = load_file(old / "adapter_model.safetensors").items()
    weights = {name: value for name, value in weights if "thinking_projection" not in name}
    save_file(weights, old / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, old


def test_a_converted_adapter_gives_what_the_published_one_does(published):
    folder, old = published
    command = ["convert", str(old), str(folder / "new"), "--residual", "embedding", "--answer_start", "#7"]
    assert main(command) == 0
    bases = [AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"answer_start": "#7"}) for _ in range(2)]
    before, after = load_adapter(bases[0], old), load_adapter(bases[1], folder / "new")
    assert after.config.thinking["answer_start"] == "#7" and after.config.thinking["residual"] == "embedding"
    before.config.thinking["answer_start"] = "#7"  # nothing in the old one says so
    inputs = ragged(byte_tokenizer())
    first, second = (sample(m, byte_tokenizer(), inputs, **GREEDY) for m in (before, after))
    assert torch.equal(first.sequences, second.sequences) and torch.equal(first.scores[0], second.scores[0])


def test_converted_to_the_projection_it_has_a_fresh_one_and_its_own_gates(published):
    folder, old = published
    convert(old, folder / "new", "projection")
    weights, was = (
        load_file(folder / "new" / "adapter_model.safetensors"),
        load_file(old / "adapter_model.safetensors"),
    )
    assert all(torch.equal(weights[name], value) for name, value in was.items())
    (name,) = set(weights) - set(was)
    assert name.endswith("thinking_projection.weight") and 0.0005 < weights[name].std() < 0.002
    model = load_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "new")
    assert sample(model, byte_tokenizer(), ragged(byte_tokenizer())).thinking_residual == "projection"
    with pytest.raises(InputError, match="already says how it thinks"):
        convert(folder / "new", folder / "again", "projection")


def test_what_is_no_hrpo_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_model("llama", thinking=False), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="holds no thinking gates"):
        convert(tmp_path / "plain", tmp_path / "new", "embedding")
    (tmp_path / "plain" / "adapter_model.safetensors").rename(tmp_path / "plain" / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled weights are not read"):
        convert(tmp_path / "plain", tmp_path / "new", "embedding")
