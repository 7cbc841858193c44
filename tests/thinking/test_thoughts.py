"""Forced thoughts, credit through time and the reference `start`, as a trainer runs them."""

import pytest
import torch
from datasets import Dataset
from rollouts import ragged
from runs import PROMPTS, config, lengths_differ, lora, small_trainer
from safetensors.torch import save_file
from tiny import byte_tokenizer, tiny_model
from transformers import GenerationConfig
from transformers.trainer_utils import IntervalStrategy

from hrpo_patches import HRPOConfig, HRPOTrainer, load_adapter, replay_forward
from hrpo_patches.models.adapter import load_plain_adapter
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs

FELT = {"r_min": 0.5, "r_max": 0.9}
FORCED, LENGTH = 3, 10


def batch_of(trainer):
    """A scored batch, as the loss gets it."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def scored(trainer, batch, k):
    """Log-probabilities, entropies, KL divergence and the gradient of the log-probabilities, by BPTT of depth k."""
    trainer.args.bptt = k
    trainer._thinking = ThinkingInputs(batch["thinking_states"], batch["thinking_mask"], trainer.args.residual)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, width, compute_entropy=True
    )
    trainer._thinking = None
    log_ratio = batch["ref_per_token_logps"] - logps
    kept = batch["completion_mask"].bool()
    trainer.model.zero_grad()
    logps[kept].sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return logps.detach()[kept], entropies.detach()[kept], (log_ratio.exp() - log_ratio - 1).detach()[kept], gradient


@pytest.mark.parametrize(
    ("family", "residual"),
    [("llama", "projection"), ("llama", "embedding"), ("qwen2", "projection"), ("qwen3", "embedding")],
)
def test_on_policy_every_depth_has_the_same_values_and_another_gradient(family, residual, tmp_path):
    trainer = small_trainer(tmp_path, family, residual=residual, max_completion_length=6)
    batch = batch_of(trainer)
    *values, published = scored(trainer, batch, 0)
    for k in (1, "exact", "sequential"):
        *others, gradient = scored(trainer, batch, k)
        for found, expected in zip(others, values, strict=True):
            assert (found - expected).abs().max() < (5e-4 if k == "sequential" else 1e-4)  # decoding rounds otherwise
        assert (gradient - published).norm() > 0.05 * published.norm()


@pytest.mark.parametrize(
    ("family", "k"),
    [("llama", 3), ("llama", "exact"), ("llama", "sequential"), ("qwen2", "exact"), ("qwen3", "exact")],
)
def test_a_step_through_time_reaches_and_changes_every_trained_weight(family, k, tmp_path):
    trainer = small_trainer(tmp_path, family, bptt=k)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def steps_of(trainer, monkeypatch):
    """Lets a trainer note, for each loss and with a gradient, the gradient and that of sequential decoding."""
    found, compute = [], trainer._compute_loss

    def compute_loss(model, inputs):
        if not torch.is_grad_enabled():  # an evaluation
            return compute(model, inputs)
        pairs, stale = [], trainer.state.global_step != trainer._rolled_out
        for depth in ("exact", "sequential"):
            with monkeypatch.context() as patch:
                patch.setattr(trainer.args, "bptt", depth)
                patch.setattr(trainer.args, "bptt_tolerance", 1e-7)
                trained = [p for p in model.parameters() if p.requires_grad]
                pairs.append(torch.cat([g.flatten() for g in torch.autograd.grad(compute(model, inputs), trained)]))
        found.append((stale, *pairs))
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", compute_loss)
    return found


@pytest.mark.parametrize(
    ("family", "residual", "evaluates"),
    [("llama", "projection", False), ("qwen2", "embedding", False), ("qwen3", "projection", True)],
)
def test_off_policy_the_gradient_is_that_of_decoding_with_todays_weights(
    family, residual, evaluates, tmp_path, monkeypatch
):
    once = {"gradient_accumulation_steps": 1, "num_iterations": 3, "max_steps": 4}
    trainer = small_trainer(tmp_path, family, residual=residual, bptt="exact", max_completion_length=6, **once)
    if evaluates:  # its rollouts are of later weights than the batch at hand
        trainer.eval_dataset = trainer.train_dataset.select(range(4))
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
    found = steps_of(trainer, monkeypatch)
    trainer.train()
    assert [stale for stale, _, _ in found] == [False, True, True, False]
    for _, exact, sequential in found:
        assert (exact - sequential).norm() < 1e-3 * sequential.norm()  # float32
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["bptt/refreshes" in row for row in rows] == [False, True, True, False]


def with_scores(trainer, monkeypatch):
    """Keeps what the rollouts were sampled from."""
    model, outs = type(trainer._base_model()), []
    generate = model.generate
    trainer.generation_config.output_scores = True
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: outs.append(generate(*args, **kwargs)) or outs[-1])
    return outs


@pytest.mark.parametrize(
    ("family", "residual"), [("llama", "projection"), ("qwen2", "embedding"), ("qwen3", "projection")]
)
def test_forced_thoughts_are_replayed_as_they_were_thought(family, residual, tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, family, residual=residual, thoughts=FORCED)
    outs = with_scores(trainer, monkeypatch)
    batch = batch_of(trainer)
    (out,) = outs
    width = batch["completion_ids"].shape[1]
    sampled = torch.stack(out.scores, 1).log_softmax(-1)[:, FORCED:]
    order = [
        next(i for i, row in enumerate(out.sequences[:, -width:].tolist()) if row == ids)
        for ids in batch["completion_ids"].tolist()
    ]  # the batch is shuffled
    expected = sampled[order].gather(-1, batch["completion_ids"][..., None])[..., 0]
    kept = batch["completion_mask"].bool()
    assert batch["thinking_states"].shape[1] == FORCED + width and batch["thinking_mask"][:, :FORCED].all()
    logps, *_ = scored(trainer, batch, 0)
    assert (logps - expected[kept]).abs().max() < 1e-4
    batch["thinking_mask"][:, :FORCED] = False  # as if the fillers had not thought
    logps, *_ = scored(trainer, batch, 0)
    assert (logps - expected[kept]).abs().max() > 1e-2


@pytest.mark.parametrize("residual", ["projection", "none"])
def test_fillers_are_left_out_of_loss_kl_length_and_text(residual, tmp_path):
    texts = []

    def reward(completions, **_):
        texts.extend(completions)
        return lengths_differ(completions)

    filler = "~"
    trainer = small_trainer(tmp_path, reward=reward, residual=residual, thoughts=FORCED, filler=filler)
    batch = batch_of(trainer)
    code = byte_tokenizer().get_vocab()[filler]
    assert (batch["prompt_ids"][:, -FORCED:] == code).all() and (batch["prompt_mask"][:, -FORCED:] == 1).all()
    assert batch["completion_ids"].shape[1] <= LENGTH - FORCED
    assert texts and not any(text.startswith(filler) for text in texts)
    lengths = trainer._metrics["train"]["completions/mean_length"]
    assert max(lengths) <= LENGTH - FORCED and batch["completion_mask"].sum(1).max() <= LENGTH - FORCED
    trainer.train()


def test_an_adapter_remembers_its_forced_thoughts(family, tmp_path, tokenizer):
    trainer = small_trainer(tmp_path, family, thoughts=FORCED, filler="~")
    trainer.train()
    trainer.save_model()
    model = load_adapter(tiny_model(family), tmp_path)
    assert model.config.thinking["thoughts"] == FORCED and model.config.thinking["filler"] == "~"
    inputs = ragged(tokenizer)
    start = inputs["input_ids"].shape[1]
    filler = tokenizer.get_vocab()["~"]
    for thinking in (True, False):  # residual-off, it is the control
        out = model.generate(**inputs, tokenizer=tokenizer, thinking=thinking, max_new_tokens=6)
        assert (out[:, start : start + FORCED] == filler).all() and (out[:, start + FORCED :] != filler).any()
    out = model.generate(**inputs, tokenizer=tokenizer, thinking=True, thoughts=0, max_new_tokens=6)
    assert (out[:, start] != filler).all()
    further = small_trainer(
        tmp_path / "further", family, load_adapter(tiny_model(family), tmp_path, is_trainable=True), None
    )
    assert further.args.thoughts == FORCED and further._fillers == [filler] * FORCED


def test_a_plain_adapter_remembers_its_pauses(tmp_path, tokenizer):
    trainer = small_trainer(tmp_path, residual="none", thoughts=FORCED, filler="~")
    trainer.train()
    trainer.save_model()
    model = load_plain_adapter(tiny_model("llama"), tmp_path)
    inputs = ragged(tokenizer)
    start = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=6)
    assert (out[:, start : start + FORCED] == tokenizer.get_vocab()["~"]).all()


REFUSED = [
    ({"thoughts": -1}, "thoughts must be 0 or more, not -1"),
    ({"thoughts": LENGTH}, f"thoughts={LENGTH} must be smaller than"),
    ({"thoughts": 2, "filler": "<nosuch>"}, "the tokenizer has no token '<nosuch>'"),
    ({"thoughts": 2, "filler": "<end>"}, "end or padding token"),
    ({"thoughts": 2, "filler": ""}, "filler must be a non-empty text"),
    ({"bptt": -1}, "bptt must be a whole number from 0"),
    ({"bptt": "most"}, "bptt must be a whole number from 0"),
    ({"replay_passes": 0}, "replay_passes must be a whole number from 1"),
    ({"replay_passes": 2, "bptt": 5}, "bptt=5 and replay_passes=2 differ"),
    ({"bptt_terms": 0}, "bptt_terms must be a whole number from 1"),
    ({"bptt_tolerance": 1.0}, "bptt_tolerance must be"),
    ({"reference": "last"}, "reference must be one of"),
    ({"bptt": 2, "residual": "none"}, "about thinking"),
    ({"reference": "start", "residual": "none"}, "about thinking"),
    ({"bptt": 2, "residual": "embedding", "top_p": 0.9}, "top_p=0.9 changes the distribution"),
    ({"bptt": "exact", "residual": "embedding", "generation_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat"),
    ({"thoughts": 2, "residual": "none", "use_transformers_continuous_batching": True}, "only generate supports"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_cannot_work_is_one_sentence(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        small_trainer(tmp_path, **options)


def test_dropout_is_refused_before_training_by_sequential_decoding_alone(tmp_path):
    with pytest.raises(InputError, match="lora_dropout.* is 0.1"):
        small_trainer(tmp_path, bptt="sequential", peft_config=lora(lora_dropout=0.1))
    small_trainer(tmp_path, bptt="exact", peft_config=lora(lora_dropout=0.1)).train()


def full_trainer(folder, **options):
    """A trainer of all weights, whose model TRL could load again by its name."""
    tiny_model("llama", thinking=False).save_pretrained(folder / "base")
    args = config(folder / "run", model_init_kwargs={"thinking": FELT}, **options)
    data = Dataset.from_dict({"prompt": PROMPTS * 8})
    return HRPOTrainer(str(folder / "base"), lengths_differ, args, data, processing_class=byte_tokenizer())


@pytest.mark.parametrize("lora_or_full", ["lora", "full"])
def test_the_reference_start_is_the_model_that_training_began_from_thinking_as_it_does(lora_or_full, tmp_path):
    options = {"reference": "start", "beta": 0.1, "max_steps": 3, "thoughts": FORCED}
    trainer = (small_trainer if lora_or_full == "lora" else full_trainer)(tmp_path, **options)
    batch = batch_of(trainer)
    logps, *_ = scored(trainer, batch, 0)
    kept = batch["completion_mask"].bool()
    assert (batch["ref_per_token_logps"][kept] - logps).abs().max() < 1e-4  # at the start, it is the policy
    began = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[2]["kl"] > 1e-3
    later = batch_of(trainer)
    ids = torch.cat([later["prompt_ids"], later["completion_ids"]], 1)
    mask = torch.cat([later["prompt_mask"], later["completion_mask"]], 1)
    today = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(began[name])
        out = replay_forward(trainer.model, ids, mask, thinking_mask=later["thinking_mask"])
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(today[name])
    width = later["completion_ids"].shape[1]
    logits = out.logits[:, -width - 1 : -1] / trainer.temperature
    expected = logits.log_softmax(-1).gather(-1, later["completion_ids"][..., None])[..., 0]
    kept = later["completion_mask"].bool()
    assert (later["ref_per_token_logps"] - expected)[kept].abs().max() < 1e-3


def test_without_a_kl_divergence_there_is_no_reference(tmp_path):
    trainer = small_trainer(tmp_path, reference="start", beta=0.0)
    assert trainer.ref_model is None and trainer.args.beta == 0.0
    assert "ref_per_token_logps" not in batch_of(trainer)


def test_a_run_with_forced_thoughts_and_its_own_start_resumes_exactly(tmp_path):
    def run(folder, seed, **options):
        torch.manual_seed(seed)  # the process that resumes may draw other weights
        trainer = small_trainer(
            tmp_path / folder,
            reference="start",
            beta=0.5,
            thoughts=FORCED,
            bptt=1,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(**options)
        return trainer

    whole = run("run", 0)
    resumed = run("run", 1, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    pairs = zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True)
    for (name, one), other in pairs:
        assert torch.equal(one, other) or not one.requires_grad, name
    assert [row["kl"] for row in resumed.state.log_history[:4]] == [row["kl"] for row in whole.state.log_history[:4]]
    (tmp_path / "run" / "reference_start.safetensors").unlink()
    with pytest.raises(InputError, match="cannot resume with reference='start'"):
        run("run", 1, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_options_are_texts_on_a_command_line_and_numbers_in_python():
    options = {"report_to": "none", "use_cpu": True, "bf16": False}
    for given, depth in (("4", 4), (4, 4), ("exact", "exact"), (0, 0)):
        assert HRPOConfig(bptt=given, **options).depth == depth
    for given, depth in (("1", 0), (4, 3), ("all", "exact")):
        with pytest.warns(FutureWarning, match=f"use bptt={depth}"):
            assert HRPOConfig(replay_passes=given, **options).depth == depth


def test_reentrant_checkpointing_is_refused_before_any_work(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(InputError, match="bptt=exact is not supported with reentrant gradient checkpointing"):
        small_trainer(tmp_path / "exact", **options)
    small_trainer(tmp_path / "published", bptt=0, **options)


def test_the_exact_gradient_is_the_default(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=2)
    assert trainer.args.bptt == "exact"
    trainer.train()
    for row in trainer.state.log_history[:2]:
        assert row["bptt/terms"] >= 1 and row["bptt/remainder"] <= 1e-3 and row["bptt/gain"] > 0.5


@pytest.mark.parametrize("said", [{}, {"typical_p": 0.3, "min_p": 0.2}], ids=["", "whatever the model's file says"])
def test_the_embedding_residual_is_made_at_the_rollouts_temperature(tmp_path, said):
    model = tiny_model("llama", thinking=FELT)
    model.generation_config.update(**said)
    trainer = small_trainer(tmp_path, model=model, residual="embedding", max_completion_length=6, temperature=0.6)
    batch = batch_of(trainer)
    *values, _ = scored(trainer, batch, 0)
    *others, _ = scored(trainer, batch, "sequential")
    assert (values[0] - others[0]).abs().max() < 1e-4


def fillers_in(trainer):
    """How many of the first completion tokens of a batch are the filler of `adapter`."""
    return (batch_of(trainer)["completion_ids"][:, 0] == byte_tokenizer().get_vocab()["~"]).sum().item()


@pytest.fixture
def adapter(tmp_path):
    trainer = small_trainer(tmp_path / "adapter", thoughts=FORCED, filler="~")
    trainer.train()
    trainer.save_model()
    return tmp_path / "adapter"


def test_going_on_without_forced_thoughts_has_none(adapter, tmp_path):
    model = load_adapter(tiny_model("llama"), adapter, is_trainable=True)
    trainer = small_trainer(tmp_path / "none", model=model, peft_config=None, thoughts=0)
    assert trainer._fillers == [] and fillers_in(trainer) < 4  # of eight; a random model may say it by chance
    model = tiny_model("llama", thinking=False)
    model.generation_config.thoughts, model.generation_config.filler_token_id = 2, 5
    own = small_trainer(tmp_path / "own", model=model, residual="none")
    assert own._fillers == [5, 5] and own.args.thoughts == 2
    model = tiny_model("llama", thinking=False)
    model.generation_config.thoughts, model.generation_config.filler_token_id = 2, 5
    assert small_trainer(tmp_path / "zero", model=model, residual="none", thoughts=0)._fillers == []


def test_an_adapters_filler_wins_over_one_that_its_base_was_left_with(adapter, tokenizer):
    base = tiny_model("llama")
    base.generation_config.filler_token_id = tokenizer.get_vocab()["@"]
    inputs = ragged(tokenizer)
    out = load_adapter(base, adapter).generate(**inputs, tokenizer=tokenizer, max_new_tokens=6)
    assert (out[:, inputs["input_ids"].shape[1]] == tokenizer.get_vocab()["~"]).all()


@pytest.mark.parametrize("residual", ["projection", "none"])
def test_a_full_model_keeps_its_end_tokens_beside_its_forced_thoughts(residual, tmp_path):
    model = tiny_model("llama", thinking=FELT if residual == "projection" else False)
    options = {"peft_config": None, "residual": residual, "thoughts": FORCED, "beta": 0.0}
    trainer = small_trainer(tmp_path, model=model, **options)
    trainer.train()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id in (model.config.eos_token_id, [model.config.eos_token_id])
    assert saved.thoughts == FORCED and saved.filler_token_id == byte_tokenizer().get_vocab()["."]


def test_the_reference_start_has_no_dropout_and_refuses_another_runs_weights(tmp_path):
    peft_config = lora(lora_dropout=0.5)
    trainer = small_trainer(tmp_path / "run", reference="start", peft_config=peft_config, save_strategy="steps")
    batches = [batch_of(trainer)["ref_per_token_logps"] for _ in range(2)]
    with trainer.ref_model.in_place():
        assert not trainer.model.training
    assert trainer.model.training and len(batches) == 2
    trainer.train()
    other = {name: torch.zeros(1) for name in trainer.ref_model.weights}
    save_file(other, tmp_path / "run" / "reference_start.safetensors")
    with pytest.raises(InputError, match="belongs to another run"):
        trainer.ref_model._read(tmp_path / "run" / "reference_start.safetensors")
