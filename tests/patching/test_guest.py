"""Whoever imports hrpo_patches and does not think cannot tell; whoever thinks says so, or is refused."""

import copy
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from runs import lora, small_trainer
from safetensors.torch import load_file, save_file
from shared_fixtures import every_family
from tiny import FAMILIES, byte_tokenizer, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.generation import GenerationMixin

from hrpo_patches import ThinkingConfig, load_adapter
from hrpo_patches.models import record
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders that the same program wrote without the patches and with them."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("stock", "patched")}
    for kind, folder in folders.items():
        subprocess.run([sys.executable, HERE / "guest_probe.py", folder, kind], check=True, cwd=HERE)
    return folders


@pytest.mark.parametrize("kind", [*FAMILIES, "llava", "internvl"])
def test_a_plain_model_has_stocks_weights_modules_and_all_linear_targets(both, kind):
    stock, patched = (json.loads((folder / "seen.json").read_text())[kind] for folder in both.values())
    assert stock["weights"] and stock["adapted"]
    assert stock == patched


@pytest.mark.parametrize("kind", [*FAMILIES, "llava", "internvl"])
def test_a_plain_model_saves_stocks_files_byte_for_byte(both, kind):
    for name in (kind, f"{kind}-again"):
        stock, patched = (
            {file.name: file.read_bytes() for file in (folder / name).iterdir()} for folder in both.values()
        )
        assert len(stock) >= 2 and stock == patched, name


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@every_family
@pytest.mark.parametrize("named", [False, True])
def test_a_plain_model_gains_the_thinking_modules_and_trains_them(tmp_path, named, family):
    model = tiny_model(family, thinking=None)
    if named:
        model.save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    trainer = small_trainer(tmp_path / "run", model=model)
    before = snapshot(trainer.model)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    for name in MODULES:
        assert any(f".{name}." in parameter for parameter in moved), name
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(tiny_model(family, thinking=None), tmp_path / "adapter")
    weights = dict(loaded.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert ".modules_to_save." not in name or torch.equal(parameter, weights[name]), name


def test_options_of_thinking_reach_no_reward_model_and_no_reference(tmp_path, caplog):
    tiny_model("llama", thinking=None).save_pretrained(tmp_path / "base")
    scorer = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(scorer).save_pretrained(tmp_path / "reward")
    byte_tokenizer().save_pretrained(tmp_path / "reward")
    options = {"dtype": "float32", "thinking": {"r_min": 0.5, "r_max": 0.6}}
    with caplog.at_level("WARNING"):
        trainer = small_trainer(
            tmp_path / "run",
            model=str(tmp_path / "base"),
            reward=str(tmp_path / "reward"),
            peft_config=None,
            beta=0.1,
            model_init_kwargs=options,
        )
    assert "already instantiated" not in caplog.text
    assert trainer.args.model_init_kwargs == options  # the user's own are as they were, for the next trainer
    assert trainer.model.config.thinking["r_min"] == 0.5
    assert not any("thinking" in name for name in trainer.ref_model.state_dict())
    trainer.train()


def test_outputs_and_generation_options_are_stocks_and_read_in_a_stock_process(both):
    stock, patched = (json.loads((folder / "seen.json").read_text()) for folder in both.values())
    for kind in ("outputs", "generation"):
        assert stock[kind] == patched[kind]
    read = "import sys, torch, transformers; torch.load(sys.argv[1], weights_only=False)"
    for folder in both.values():
        subprocess.run([sys.executable, "-c", read, folder / "outputs.pt"], check=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(its folder, its base's folder) of a thinking adapter for a plain base."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model("llama", thinking=None).save_pretrained(folder / "base")
    trainer = small_trainer(folder / "run", model=str(folder / "base"), max_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter", folder / "base"


def test_a_thinking_adapter_that_peft_alone_puts_on_a_plain_base_is_refused(adapter):
    folder, base = adapter
    for load in (
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
        lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: AutoModelForCausalLM.from_pretrained(base).load_adapter(str(folder)),
    ):
        with pytest.raises(
            InputError, match=r"(PEFT would lose it|thinks); load (the adapter|it) with hrpo_patches\.load_adapter"
        ):
            load()


def test_a_thinking_adapter_that_peft_alone_puts_on_a_thinking_base_is_whole(adapter):
    folder, base = adapter
    ours = dict(load_adapter(AutoModelForCausalLM.from_pretrained(base), folder).named_parameters())
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, thinking={}), folder)
    for name, parameter in theirs.named_parameters():
        assert "original_module" in name or torch.equal(parameter, ours[name]), name


def test_peft_alone_does_not_let_an_adapter_think_in_another_way_than_it_was_trained_to(adapter):
    folder, base = adapter
    for other in ({"answer_start": "##"}, {"residual_scale": "embedding"}, {"residual": "embedding"}):
        model = AutoModelForCausalLM.from_pretrained(base, thinking=other)
        with pytest.raises(InputError, match=f"was trained with {next(iter(other))}=.*hrpo_patches.load_adapter"):
            PeftModel.from_pretrained(model, folder)
    thinking = AutoModelForCausalLM.from_pretrained(base, thinking={})
    for load in (
        lambda: thinking.load_adapter(str(folder)),
        lambda: AutoModelForCausalLM.from_pretrained(folder, thinking={}),
    ):
        with pytest.raises(InputError, match="thinks; load it with hrpo_patches.load_adapter"):
            load()


@pytest.mark.parametrize("given", [True, {}, ThinkingConfig(r_min=0.5, r_max=0.6), {"r_min": 0.5, "r_max": 0.6}])
def test_thinking_can_be_asked_for_in_model_init_kwargs_as_anywhere(tmp_path, given):
    tiny_model("llama", thinking=None).save_pretrained(tmp_path / "base")
    trainer = small_trainer(tmp_path / "run", model=str(tmp_path / "base"), model_init_kwargs={"thinking": given})
    assert trainer.model.config.thinking["r_min"] == (0.5 if given not in (True, {}) else 0.99)


def test_a_run_that_thinks_does_not_take_a_model_that_is_told_not_to(tmp_path):
    tiny_model("llama", thinking=None).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="model_init_kwargs say thinking=False"):
        small_trainer(tmp_path / "run", model=str(tmp_path / "base"), model_init_kwargs={"thinking": False})


def test_plain_grpo_of_a_checkpoint_that_thinks_leaves_its_thoughts_out_and_tells_no_reward_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    scorer = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(scorer).save_pretrained(tmp_path / "reward")
    byte_tokenizer().save_pretrained(tmp_path / "reward")
    trainer = small_trainer(
        tmp_path / "run",
        model=str(tmp_path / "base"),
        reward=str(tmp_path / "reward"),
        residual=None,
        peft_config=None,
        model_init_kwargs={"thinking": False},
    )
    trainer.train()
    assert not any("thinking" in name for name in trainer.model.state_dict())


def test_a_model_that_declines_to_think_generates_and_saves_as_a_plain_one(tmp_path):
    model = tiny_model("llama")
    model.generation_config.thinking, model.generation_config.thoughts = True, 2
    model.save_pretrained(tmp_path / "thinks")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "thinks", thinking=False)
    plain.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    plain.save_pretrained(tmp_path / "plain")
    assert "thinking" not in (tmp_path / "plain" / "generation_config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "thinks").generation_config.thinking is True


def test_a_named_checkpoint_that_thinks_takes_other_forced_thoughts(tmp_path):
    tiny_model("llama", thinking={"thoughts": 1}).save_pretrained(tmp_path / "base")
    own, other = (
        small_trainer(tmp_path / f"run{i}", model=str(tmp_path / "base"), peft_config=None, **options)
        for i, options in enumerate(({}, {"thoughts": 3, "filler": "a"}))
    )
    assert (own.args.thoughts, own.args.filler) == (1, ".") and own.model.config.thinking["thoughts"] == 1
    assert (other.args.thoughts, other.args.filler) == (3, "a") and other.model.config.thinking["thoughts"] == 3


def test_thinking_modules_that_a_model_lacks_cannot_be_trained_with_peft():
    with pytest.raises(InputError, match="the adapter holds thinking_projection"):
        get_peft_model(tiny_model("llama", thinking=None), lora(modules_to_save=["thinking_projection"]))


def test_all_linear_passes_the_thinking_modules_by(family):
    variant = {"projection_layers": 2}
    targets = {
        key: {name for name, _ in get_peft_model(model, LoraConfig(target_modules="all-linear")).named_parameters()}
        for key, model in {
            "plain": tiny_model(family, thinking=None),
            "thinking": tiny_model(family),
            "two layers": tiny_model(family, thinking=variant),
        }.items()
    }
    adapted = {key: {name for name in names if "lora_" in name} for key, names in targets.items()}
    assert adapted["plain"] and adapted["plain"] == adapted["thinking"] == adapted["two layers"]
    assert any(name for name in targets["thinking"] if MODULES[0] in name)


def test_plain_training_in_two_processes_is_stocks_bit_for_bit(tmp_path):
    found = {}
    for kind in ("stock", "patched"):
        subprocess.run([sys.executable, HERE / "gloo_probe.py", tmp_path / kind, kind], check=True, cwd=HERE)
        found[kind] = load_file(tmp_path / kind)
    stock, patched = found["stock"], found["patched"]
    assert stock.keys() == patched.keys() and {name.split(".")[1] for name in stock} == {"ddp", "fsdp1", "fsdp2"}
    assert not [name for name, value in stock.items() if not torch.equal(value, patched[name])]


def test_the_optimizer_state_of_a_stock_run_resumes_under_the_patches(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from gloo_probe import fresh, steps\n"
        "assert 'hrpo_patches' not in sys.modules\n"
        "model = fresh('llama'); optimizer = torch.optim.AdamW(model.parameters(), 1e-2); steps(model, optimizer, 0)\n"
        "torch.save((model.state_dict(), optimizer.state_dict()), sys.argv[3])\n"
        "steps(model, optimizer, 1)\n"
        "torch.save(model.state_dict(), sys.argv[3] + '.end')"
    )
    subprocess.run([sys.executable, "-c", code, HERE, "stock", str(tmp_path / "run")], check=True)
    resume = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from gloo_probe import fresh, steps\n"
        "import torch; assert 'hrpo_patches' in sys.modules\n"
        "model = fresh('llama'); optimizer = torch.optim.AdamW(model.parameters(), 1e-2)\n"
        "weights, state = torch.load(sys.argv[3], weights_only=True)\n"
        "model.load_state_dict(weights, strict=True); optimizer.load_state_dict(state); steps(model, optimizer, 1)\n"
        "end = torch.load(sys.argv[3] + '.end', weights_only=True)\n"
        "assert end.keys() == model.state_dict().keys()\n"
        "assert all(torch.equal(value, end[name]) for name, value in model.state_dict().items())"
    )
    subprocess.run([sys.executable, "-c", resume, HERE, "patched", str(tmp_path / "run")], check=True)


def test_a_published_adapter_that_lacks_a_gate_is_said_to_be_damaged(adapter, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "published")
    (folder / "thinking_config.json").unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "gate_r" not in name and "projection" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="is damaged, or .*thinking_residual_gate_r.* is missing"):
        load_adapter(AutoModelForCausalLM.from_pretrained(adapter[1]), folder)


def test_peft_saves_and_loads_adapters_of_a_strangers_module_and_asks_the_hub_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "find_file", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(torch.nn.Sequential(*map(copy.deepcopy, model.children())), tmp_path)
    again.load_adapter(tmp_path, "other")
    assert set(again.peft_config) == {"default", "other"}


def test_the_hub_is_asked_about_a_thinking_adapter_as_its_caller_asks(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(record, "find_file", lambda name, file, **hub: asked.append((name, hub)))
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(Exception, match="owner/name"):  # there is no such adapter
        model.load_adapter("owner/name", "other", revision="v2", token="t", local_files_only=True)
    ((name, hub),) = asked
    assert name == "owner/name" and hub["revision"] == "v2" and hub["token"] == "t" and hub["local_files_only"]


@pytest.mark.parametrize("value", ["deep", {"budget": 3}, 7])
def test_a_config_in_which_thinking_is_another_librarys_is_left_alone(value, family, tmp_path):
    for config in (GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9), tiny_config(family, thinking=None)):
        config.thinking = value
        model = AutoModelForCausalLM.from_config(config)
        assert not any("thinking" in name for name in model.state_dict())
        model.save_pretrained(tmp_path / config.model_type)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / config.model_type)
        assert again.config.thinking == value
        adapted = get_peft_model(again, LoraConfig(target_modules="all-linear"))
        adapted.save_pretrained(tmp_path / "adapter")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path / "adapter")


def test_an_option_that_is_mistyped_is_still_refused():
    with pytest.raises(InputError, match="unknown thinking option 'residuall'"):
        tiny_model("llama", thinking={"residuall": "projection"})


def test_parts_of_a_family_gain_no_methods_of_generation(family):
    config = tiny_config(family, thinking=None)
    model = FAMILIES[family][1](config)
    for stranger in (type(model.model), AutoModelForSequenceClassification.from_config(config).__class__):
        for name in ("generate_batch", "init_continuous_batching", "adjust_generation_fn"):
            assert not hasattr(stranger, name), (stranger, name)
    stock = inspect.signature(GenerationMixin.generate_batch).parameters
    ours = inspect.signature(type(model).generate_batch).parameters
    assert [*stock] == [name for name in ours if name not in ("thinking", "thoughts", "tokenizer")] and len(ours) > 7


def test_remote_code_with_a_generation_of_its_own_is_loaded(tmp_path):
    class Own:
        def generate(self, ids):
            return self.model(ids).last_hidden_state.argmax(-1)

    class Remote(LlamaPreTrainedModel, Own):
        def __init__(self, config):
            super().__init__(config)
            self.model = LlamaModel(config)
            self.post_init()

    tiny_model("llama", thinking=None).save_pretrained(tmp_path)
    assert Remote.from_pretrained(tmp_path).generate(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2)
