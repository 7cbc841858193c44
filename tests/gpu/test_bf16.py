"""What only a GPU can show: bf16 and quantized bases, offloaded checkpoints, TRL's fused head, twenty steps."""

import json

import pytest
import torch
from harness import ON_GPU
from probes import LENGTH, thinking_gradients
from programs import HERE, ROOT, TARGETS, python
from rollouts import ragged, replayed_logps, sample, sampled_logps
from safetensors.torch import load_file
from test_adapter import check
from unsloth import FastLanguageModel

from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.parts import MODULES

BF16 = torch.bfloat16 if ON_GPU else torch.float32  # Triton's interpreter multiplies bf16 wrongly
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="its kernels have no interpreter")


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    """By backend, what probe.py computed in bf16."""
    folder = tmp_path_factory.mktemp("results")
    for backend in ("transformers", "unsloth"):
        python(HERE / "probe.py", folder / backend, backend, checkpoints, str(BF16).removeprefix("torch."))
    return {backend: load_file(folder / backend) for backend in ("transformers", "unsloth")}


def relative(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def test_logits_agree_with_transformers_to_bf16(results, family):
    for mode in ("eval", "train"):
        name = f"{family}.{mode}.logits"
        assert relative(results["unsloth"][name], results["transformers"][name]) < 0.05


def test_gradients_agree_with_transformers_to_bf16(results, family):
    theirs = {key: value for key, value in results["transformers"].items() if key.startswith(f"{family}.grad.")}
    assert len(theirs) == 6
    for name, value in theirs.items():
        assert value.norm() > 0 and relative(results["unsloth"][name], value) < 0.15, name


def test_a_bf16_replay_is_close_and_a_shifted_one_is_not(load, family, tokenizer):
    model = load(family, BF16).eval()
    inputs = ragged(tokenizer).to(model.device)
    out = sample(model, tokenizer, inputs, biased=False)
    right = (replayed_logps(model, out, inputs) - sampled_logps(out, inputs)).abs().median()
    shifted = torch.roll(out.thinking_states, -1, 1)
    wrong = (replayed_logps(model, out, inputs, states=shifted) - sampled_logps(out, inputs)).abs().median()
    print(f"median difference: {right:.4f} replayed, {wrong:.4f} off by one")
    assert right < 0.1 and wrong > 5 * right


@only_on_gpu
def test_the_copies_are_float32_on_a_4_bit_base(checkpoints):
    model, _ = FastLanguageModel.from_pretrained(str(checkpoints / "plain-llama"), 256, load_in_4bit=True, thinking={})
    assert model.model.thinking_projection.weight.dtype == torch.float32
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS, modules_to_save=list(MODULES))
    check(model, model.get_input_embeddings().weight.dtype)


WIDE = """
import hrpo_patches, sys, torch
from tiny import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=288, hidden_size=512, intermediate_size=512, num_hidden_layers=2,
                     num_attention_heads=8, max_position_embeddings=1024, thinking={"r_min": 0.3, "r_max": 0.6})
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
byte_tokenizer().save_pretrained(sys.argv[1])
"""


@only_on_gpu
def test_gradients_pass_the_offloaded_checkpoints(tmp_path):
    """From 512 positions and 2 MB on, unsloth keeps checkpoints in pinned host memory, in 16 bits."""
    python("-c", WIDE, tmp_path)
    length, gradients = 600, {}
    for checkpointing in (False, "unsloth"):
        torch.manual_seed(0)
        model, _ = FastLanguageModel.from_pretrained(
            str(tmp_path), 1024, torch.bfloat16, load_in_4bit=False, use_gradient_checkpointing=checkpointing
        )
        model = FastLanguageModel.get_peft_model(
            model, r=4, target_modules=TARGETS, modules_to_save=list(MODULES), use_gradient_checkpointing=checkpointing
        )
        FastLanguageModel.for_training(model)
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "input_ids": torch.randint(0, 200, (4, length), generator=generator).to(model.device),
            "attention_mask": torch.ones(4, length, dtype=torch.long, device=model.device),
            "thinking_inputs": ThinkingInputs(
                torch.randn(4, LENGTH, 512, generator=generator).to(model.device),
                torch.ones(4, LENGTH, dtype=torch.bool, device=model.device),
                "projection",
            ),
        }
        gradients[checkpointing] = thinking_gradients(model, inputs)
    for name, value in gradients[False].items():
        assert value.norm() > 0 and relative(gradients["unsloth"][name], value) < 0.05, name


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"{a}+{b}?", "answer": f"#### {a + b}"} for a in range(1, 10) for b in range(1, 10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@only_on_gpu
@pytest.mark.parametrize("backend", ["unsloth", "transformers"])
def test_twenty_steps_train_the_projection(checkpoints, problems, tmp_path, backend):
    options = {
        "model_name": checkpoints / "plain-llama",
        "dataset": problems,
        "backend": backend,
        "prompt": "plain",
        "examples": "2+3?\n5 #### 5",
        "output_dir": tmp_path / "run",
        "max_steps": 20,
        "gradient_accumulation_steps": 1,
        "max_prompt_length": 100,
        "max_completion_length": 24,
        "lora_rank": 4,
        "beta": 0.5,
        "temperature": 1,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert f"backend: {backend}" in python(ROOT / "scripts" / "hrpo_gsm8k.py", *words)
    steps = [row for row in json.loads((tmp_path / "run" / "report.json").read_text())["log"] if "loss" in row]
    assert len(steps) == 20 and all(row["projection/grad_norm"] > 0 for row in steps)
    assert all(row["loss"] == row["loss"] and row["kl"] == row["kl"] for row in steps)  # no NaN
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert steps[0]["projection/weight_norm"] != steps[-1]["projection/weight_norm"]


FUSED = """
import hrpo_patches, sys, torch
from transformers import AutoModelForCausalLM
from hrpo_patches import HRPOConfig, HRPOTrainer
from hrpo_thinking.inputs import ThinkingInputs
from probes import LENGTH, replay_inputs
from tiny import byte_tokenizer
from datasets import Dataset
tokenizer = byte_tokenizer()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).cuda()
args = HRPOConfig(output_dir=sys.argv[2], report_to=[], bf16=False, temperature=0.7)
data = Dataset.from_list([{"prompt": "Hi"}] * 8)
trainer = HRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args, data, processing_class=tokenizer)
inputs = replay_inputs(model, tokenizer)
trainer._thinking = inputs["thinking_inputs"]
scores = {}
for fused in (True, False):
    trainer._has_fused_head = lambda _, fused=fused: fused
    scores[fused], *_ = trainer._get_per_token_logps_and_entropies(
        model, inputs["input_ids"], inputs["attention_mask"], LENGTH)
real = inputs["attention_mask"][:, -LENGTH:].bool()
difference = (scores[True] - scores[False])[real].abs().max().item()
print("largest difference", difference)
assert difference < 1e-3
"""


@only_on_gpu
def test_trls_fused_head_scores_a_replay_as_plain_torch_does(checkpoints, tmp_path):
    assert "largest difference" in python("-c", FUSED, checkpoints / "llama", tmp_path)
