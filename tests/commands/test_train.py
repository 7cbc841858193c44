"""The training script as a person runs it: it trains on real data, and what cannot work is one sentence."""

import importlib.util
import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import processes
import pytest
import torch
from runs import parse, run_of_sums
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from trl import GRPOConfig

from hrpo_patches.commands import calls
from hrpo_patches.commands.main import main as cli
from hrpo_patches.commands.main import train as main
from hrpo_patches.commands.train import _use_engine as use_engine
from hrpo_patches.commands.train import make_trainer, next_commands
from hrpo_patches.commands.train_flags import TrainingFlags, make_parser
from hrpo_patches.models.base import open_model
from hrpo_patches.monitor.report import read_run
from hrpo_patches.tasks.prompts import prompt_as_trained, prompt_ids
from hrpo_thinking.errors import InputError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "hrpo_gsm8k.py"
TINY = [
    "--max_steps",
    "1",
    "--max_completion_length",
    "6",
    "--per_device_train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
]


@pytest.fixture
def base(tmp_path):
    model = tiny_model("qwen2", thinking=False)
    model.config.thinking = None
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"it is\n#### {2 * i}"} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


def script(*arguments):
    return processes.run(processes.script, SCRIPT, *arguments)


def test_the_defaults_are_the_published_ones(tmp_path):
    run = parse(["--output_dir", str(tmp_path / "run")])
    flags = run.record() | {"optim": TrainingFlags.optim}  # which becomes adamw_torch without a GPU
    published = {
        "model_name": "Qwen/Qwen2.5-1.5B-Instruct",
        "lora_rank": 32,
        "learning_rate": 5e-6,
        "beta": 0.005,
        "r_min": 0.99,
        "r_max": 0.999,
        "lr_residual_gate": 1e-4,
        "lr_residual_Lambda": 1e-3,
        "lr_thinking_projection": 1e-4,
        "weight_decay": 0.1,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "optim": "paged_adamw_8bit",
        "max_grad_norm": 0.1,
        "num_generations": 4,
        "temperature": 0.5,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 8,
        "max_prompt_length": 1024,
        "max_completion_length": 1024,
        "seed": 42,
        "save_steps": 250,
    }
    assert {key: flags[key] for key in published} == published


def test_the_options_reach_the_trainer(tmp_path, capsys):
    arguments = parse(
        ["--output_dir", str(tmp_path / "run"), "--max_steps", "10", "--lr", "1e-3", "--residual", "none"]
    )
    config = arguments.config
    assert (config.learning_rate, config.residual, config.save_total_limit) == (1e-3, None, 3)
    assert config.get_warmup_steps(10) == 1
    assert capsys.readouterr().out == "paged_adamw_8bit needs bitsandbytes and a GPU; using adamw_torch.\n"


def test_every_option_reaches_what_it_is_for(tmp_path):
    options = {
        "lr": (0.11, "learning_rate"),
        "beta": (0.12, "beta"),
        "lr_residual_gate": (0.13, "lr_residual_gate"),
        "lr_residual_Lambda": (0.14, "lr_residual_Lambda"),
        "lr_thinking_projection": (0.15, "lr_thinking_projection"),
        "weight_decay": (0.16, "weight_decay"),
        "warmup_ratio": (0.17, "warmup_steps"),
        "lr_scheduler_type": ("linear", "lr_scheduler_type"),
        "max_grad_norm": (0.18, "max_grad_norm"),
        "group_size": (3, "num_generations"),
        "temperature": (0.19, "temperature"),
        "gradient_accumulation_steps": (6, "gradient_accumulation_steps"),
        "per_device_train_batch_size": (5, "per_device_train_batch_size"),
        "max_completion_length": (21, "max_completion_length"),
        "seed": (22, "seed"),
        "residual": ("embedding", "residual"),
        "answer_start": ("##", "answer_start"),
        "max_steps": (23, "max_steps"),
        "save_steps": (24, "save_steps"),
        "logging_steps": (25, "logging_steps"),
    }
    flags = [text for name, (value, _) in options.items() for text in (f"--{name}", str(value))]
    config = parse([*flags, "--output_dir", str(tmp_path / "run")]).config
    for name, (value, field) in options.items():
        assert getattr(config, field) == value, name
    assert config.loss_type == "grpo"
    thinking = parse(["--residual_r_min", "0.3", "--residual_r_max", "0.4", "--output_dir", str(tmp_path)]).thinking()
    assert (thinking.r_min, thinking.r_max) == (0.3, 0.4)


def test_a_yaml_file_gives_options_and_flags_win_over_it(tmp_path):
    (tmp_path / "c.yaml").write_text('lr: 1.0e-3\nseed: 7\nexamples:\n  - "1 + 1 = 2 #### 2"\n')
    arguments = parse(["--config", str(tmp_path / "c.yaml"), "--seed", "8", "--output_dir", str(tmp_path / "run")])
    assert (arguments.config.learning_rate, arguments.config.seed) == (1e-3, 8)
    assert arguments.about.examples == ["1 + 1 = 2 #### 2"]
    (tmp_path / "c.yaml").write_text("learning_rat: 1.0e-3\n")
    with pytest.raises(InputError, match="learning_rat"):
        parse(["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("lr: [1\n")
    with pytest.raises(InputError) as error:
        parse(["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"no\.yaml"):
        parse(["--config", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize("name", ["quickstart", "smollm2-gsm8k"])
def test_a_config_that_is_shipped_is_valid(name):
    path = ROOT / "configs" / f"{name}.yaml"
    assert parse(["--config", str(path), "--output_dir", "runs/none-such"]).about.eval_problems


def test_the_config_after_a_supervised_start_asks_for_its_adapter():
    with pytest.raises(InputError, match="runs/sft-gsm8k holds no adapter"):  # and nothing else is wrong with it
        parse(["--config", str(ROOT / "configs" / "grpo-after-sft.yaml"), "--output_dir", "runs/none-such"])


@pytest.mark.parametrize("residual", ["projection", "embedding", "none"])
def test_a_run_trains_saves_and_reports(base, data, tmp_path, residual, capsys):
    folder = tmp_path / "run"
    arguments = ["--model_name", base, "--dataset", data, "--residual", residual, "--output_dir", str(folder)]
    arguments += ["--eval_problems", "5"]
    record = main([*arguments, *TINY, "--report", "--save_steps", "1"])
    assert record["before"]["total"] == record["after"]["total"] == 5
    assert json.loads((folder / "report.json").read_text())["log"] == record["log"]
    assert (folder / "report.png").is_file()
    assert (folder / "thinking_config.json").is_file() == (residual != "none")
    weights = load_file(folder / "adapter_model.safetensors")
    assert any("thinking_projection" in key for key in weights) == (residual == "projection")
    assert "greedy accuracy" in capsys.readouterr().out
    with pytest.raises(InputError, match="already holds a run"):
        main([*arguments, *TINY])
    lora = json.loads((folder / "adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], len(lora["target_modules"])) == (32, 64, 7)
    again = main([*arguments, *TINY, "--max_steps", "2", "--resume_from_checkpoint", "latest"])
    assert max(row["step"] for row in again["log"]) == 2
    assert again["log"][0] == record["log"][0]  # the first step was not done again
    other = "embedding" if residual == "projection" else "projection"
    with pytest.raises(InputError, match=f"trained with --residual {residual}, not {other}"):
        main([*arguments, *TINY, "--max_steps", "3", "--resume_from_checkpoint", "latest", "--residual", other])
    if residual != "none":
        with pytest.raises(InputError, match="trained with --answer_start '####'"):
            main([*arguments, *TINY, "--max_steps", "3", "--resume_from_checkpoint", "latest", "--answer_start", "##"])


def test_a_resume_asks_whether_the_checkpoint_is_whole_of_this_run_and_not_its_last(base, data, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["--model_name", base, "--dataset", data, "--output_dir", str(folder), *TINY, "--save_steps", "1"]
    main([*command, "--max_steps", "2"])
    whole = load_file(folder / "adapter_model.safetensors")
    resume = [*command, "--resume_from_checkpoint", "latest"]
    with pytest.raises(InputError, match="is complete: 2 steps, and report.json"):
        main([*resume, "--max_steps", "2"])
    with pytest.raises(InputError, match="started with --seed 42, not 43"):
        main([*resume, "--max_steps", "3", "--seed", "43"])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "trainer_state.json").write_text("{")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "x.safetensors"):
        (tmp_path / "cut" / name).touch()
    with pytest.raises(InputError, match="is not valid JSON"):
        main([*command, "--resume_from_checkpoint", str(tmp_path / "cut"), "--output_dir", str(tmp_path / "other")])
    for name in ("report.json", "adapter_model.safetensors"):  # as if the end alone had been lost
        (folder / name).unlink()
    record = main([*resume, "--max_steps", "2", "--lr", "1e-4"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed with")]
    assert said == ["resumed with --learning_rate 0.0001; started with 5e-06."]
    assert max(row["step"] for row in record["log"]) == 2 and not (folder / "checkpoint-3").exists()
    found = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        kept = (folder / "checkpoint-2" / name).read_bytes()
        (folder / "checkpoint-2" / name).unlink()
        with pytest.raises(InputError, match="is incomplete: .* is missing"):
            main([*resume, "--max_steps", "3"])
        (folder / "checkpoint-2" / name).write_bytes(kept)


def test_the_engine_flag_refuses_what_the_configuration_of_vllm_does(base, data, tmp_path):
    words = ["--model_name", base, "--dataset", data, "--output_dir", str(tmp_path / "run"), *TINY]
    for narrowed, refused in ((["--top_p", "0.9"], True), ([], False)):
        run = parse([*words, *narrowed])
        with pytest.raises(InputError, match="importance sampling") if refused else nullcontext():
            use_engine("vllm", run.config, None, 20)


def test_a_run_of_epochs_is_complete_when_its_epochs_are(base, data, tmp_path):
    folder = tmp_path / "run"
    command = ["--model_name", base, "--dataset", data, "--output_dir", str(folder), *TINY, "--max_steps", "-1"]
    main([*command, "--num_train_epochs", "0.1", "--save_strategy", "epoch"])
    resume = [*command, "--resume_from_checkpoint", "latest", "--save_strategy", "epoch"]
    with pytest.raises(InputError, match="is complete"):
        main([*resume, "--num_train_epochs", "0.1"])
    longer = main([*resume, "--num_train_epochs", "0.2"])
    assert longer["log"][-1]["epoch"] == pytest.approx(0.2)


def test_a_run_that_was_refused_before_its_first_step_leaves_its_folder_free(base, data, tmp_path):
    command = ["--model_name", base, "--dataset", data, "--output_dir", str(tmp_path / "run"), *TINY]
    with pytest.raises(InputError, match="--loss_type nonsense"):
        main([*command, "--loss_type", "nonsense"])
    main(command)


def test_options_of_loading_and_of_evaluation_reach_the_model_and_the_trainer(base, data, tmp_path):
    arguments = ["--model_name", base, "--dataset", data, "--output_dir", str(tmp_path / "run"), *TINY]
    for flags, message in (
        (["--trust_remote_code", "true"], "runs no code"),
        (["--model_init_kwargs", '{"thinking": true}'], "has flags of its own"),
        (["--model_init_kwargs", '{"dtype": "float17"}'], "dtype one of"),
        (["--eval_strategy", "steps"], "require --eval_problems"),
        (["--enable_jit_checkpoint", "true"], "upon SIGTERM by itself"),
        (["--report_to", "tensorboard", "trackio"], "--report_to trackio"),
    ):
        with pytest.raises(InputError, match=message):
            parse([*arguments, *flags])
    init = ["--model_init_kwargs", '{"dtype": "bfloat16", "attn_implementation": "eager"}']
    evaluation = [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--eval_problems",
        "8",
        "--num_generations_eval",
        "4",
    ]
    run = parse([*arguments, *init, *evaluation, "--per_device_eval_batch_size", "4"])
    run.backend = "transformers"
    trainer, _, held_out = make_trainer(run)
    assert trainer.model.config._attn_implementation == "eager" and len(trainer.eval_dataset) == len(held_out) == 8
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    trainer.train()
    assert any("eval_reward" in row for row in trainer.state.log_history)


def test_whoever_asks_an_adapter_asks_what_was_asked_in_training(base, data, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if enable_thinking is false %}!{% endif %}"
    )
    tokenizer.save_pretrained(base)
    folder, options = tmp_path / "run", '{"enable_thinking": false}'
    arguments = ["--model_name", base, "--dataset", data, "--output_dir", str(folder), *TINY]
    with pytest.raises(InputError, match="prompts are plain text"):
        main([*arguments, "--prompt", "plain", "--chat_template_kwargs", options])
    with pytest.raises(InputError, match="has no variable deep"):
        main([*arguments, "--prompt", "chat", "--chat_template_kwargs", '{"deep": 1}'])
    run = parse([*arguments, "--prompt", "chat", "--chat_template_kwargs", options])
    run.backend = "transformers"
    trainer, *_ = make_trainer(run)
    row = trainer.train_dataset[0]["prompt"]
    asked = trainer._tokenize_prompts([row])[0][0]
    main([*arguments, "--prompt", "chat", "--chat_template_kwargs", options, "--save_steps", "1"])
    _, saved = open_model(str(folder))
    question = row[1]["content"]
    again = prompt_as_trained(str(folder), question)
    assert again == row and prompt_ids(saved, again) == asked and saved.decode(asked).endswith("!")
    other = ["--adapter", str(folder), "--output_dir", str(tmp_path / "further"), "--prompt", "chat"]
    main([*arguments[:4], *TINY, *other])
    assert prompt_ids(open_model(str(tmp_path / "further"))[1], again) == asked  # whose template is the adapter's
    (tmp_path / "report.json").write_text('["no report"]')
    assert prompt_as_trained(str(tmp_path), question) is None
    calls.think([str(folder), "--prompt", question, "--max_new_tokens", "2"])
    assert "Asked as in training, with the instruction of the run" in capsys.readouterr().out
    assert prompt_as_trained(str(folder / "checkpoint-1"), question) == row
    (folder / "report.json").unlink()  # as before a run has ended
    assert prompt_as_trained(str(folder), question) == prompt_as_trained(str(folder / "checkpoint-1"), question) == row


def test_a_run_trains_on_rollouts_of_continuous_batching(base, data, tmp_path, capsys):
    arguments = ["--model_name", base, "--dataset", data, "--output_dir", str(tmp_path / "run"), *TINY]
    record = main([*arguments, "--engine", "auto", "--eval_problems", "3", "--max_steps", "2"])
    assert "engine: continuous (not vllm: vLLM is not installed" in capsys.readouterr().out
    assert record["log"][0]["projection/grad_norm"] > 0 and record["arguments"]["engine"] == "auto"
    assert record["after"]["total"] == 3
    refused = ["--engine", "continuous", "--residual", "embedding", "--output_dir", str(tmp_path / "other")]
    with pytest.raises(InputError, match="--engine continuous cannot be used"):
        main([*arguments, *refused])


def test_a_run_goes_on_from_an_adapter_with_a_projection_of_its_own(base, data, tmp_path):
    options = ["--model_name", base, "--dataset", data, *TINY]
    main([*options, "--residual", "embedding", "--output_dir", str(tmp_path / "old")])
    new = [*options, "--adapter", str(tmp_path / "old"), "--output_dir", str(tmp_path / "new")]
    with pytest.raises(InputError, match="--init_projection"):
        main(new)
    main([*new, "--init_projection"])
    weights = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert weights["base_model.model.model.thinking_projection.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--residual_r_min", "0.999", "--residual_r_max", "0.99"], "0 < r_min < r_max < 1"),
        (["--dataset", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_the_script_says_one_sentence_and_exits_with_2(arguments, sentence, tmp_path):
    result = script(*arguments, "--output_dir", str(tmp_path / "run"))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--residual", "both"], "--residual: invalid choice: 'both' .choose from"),
        (["--residual_r_max", "1.0"], "r_min < r_max"),
        (["--prompt", "loud"], "--prompt: invalid choice: 'loud'"),
        (["--examples", "1 + 1 = 2"], "carry the marker"),
        (["--init_projection"], "requires --adapter"),
        (["--resume_from_checkpoint", "latest"], "holds no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--max_completion_length", "0"], "max_completion_length must be at least 1"),
        (["--eval_problems", "-1"], "--eval_problems must be 0 or more"),
        (["--report_to", "paper"], "--report_to.*: invalid choice: 'paper'"),
        (["--report_to", "trackio"], "pip install trackio"),
    ],
)
def test_arguments_that_cannot_work_are_one_sentence(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        parse([*arguments, "--output_dir", str(tmp_path / "run")])


def test_a_folder_with_another_run_is_not_resumed_into(base, data, tmp_path):
    options = ["--model_name", base, "--dataset", data, *TINY, "--save_steps", "1"]
    main([*options, "--output_dir", str(tmp_path / "one")])
    main([*options, "--output_dir", str(tmp_path / "two"), "--seed", "1"])
    before = (tmp_path / "two" / "adapter_model.safetensors").read_bytes()
    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-1")]
    with pytest.raises(InputError, match="another run"):
        main([*options, "--output_dir", str(tmp_path / "two"), *checkpoint])
    assert (tmp_path / "two" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="trained with --answer_start"):
        adapter = ["--adapter", str(tmp_path / "one"), "--answer_start", "##"]
        main([*options, "--output_dir", str(tmp_path / "three"), *adapter])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per_device_train_batch_size", "400"], "30 training problems are too few: one step needs 100"),
        (["--group_size", "3"], "must be divisible by num_generations"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--answer_start", "\ud800"], "marker|utf|surrogate"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(base, data, tmp_path, arguments, message):
    options = ["--model_name", base, "--dataset", data, *TINY, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=message) as error:
        main([*options, *arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_left_out_and_counted(base, data, tmp_path, caplog):
    arguments = ["--model_name", base, "--dataset", data, "--output_dir", str(tmp_path / "run"), *TINY]
    example = ["--examples", "1 + 1 = 2 #### 2", "--prompt", "plain"]
    main([*arguments, *example, "--max_prompt_length", "34"])
    assert "20 of 30 problems have prompts of more than 34 tokens and are skipped." in caplog.text
    with pytest.raises(InputError, match="every prompt is longer"):
        main([*arguments, *example, "--max_prompt_length", "5", "--output_dir", str(tmp_path / "other")])


def test_a_model_family_without_patches_is_refused(data, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    arguments = ["--model_name", str(tmp_path / "gpt2"), "--dataset", data, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="is a gpt2 model; .* patches for Llama, "):
        main([*arguments, *TINY])
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_found_is_refused(data, tmp_path):
    arguments = ["--model_name", str(tmp_path / "no-model"), "--dataset", data, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="no-model does not exist") as error:
        main([*arguments, *TINY])
    assert "\n" not in str(error.value)


def test_the_script_is_importable_and_documents_its_defaults():
    spec = importlib.util.spec_from_file_location("hrpo_gsm8k", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main) and module.main.__doc__
    result = script("--help")
    assert "--lr_thinking_projection" in result.stdout and "(default: 0.0001)" in result.stdout
    assert "--top_p" not in result.stdout and "--top_p" in script("--help_all").stdout


def test_every_option_of_trl_is_a_flag_and_a_published_name_is_the_same_one(tmp_path):
    folder = ["--output_dir", str(tmp_path / "run")]
    options = ["--top_p", "0.9", "--num_iterations", "2", "--num_train_epochs", "3", "--loss_type", "dapo"]
    config = parse([*folder, *options, "--save_total_limit", "7"]).config
    assert (config.top_p, config.num_iterations, config.num_train_epochs) == (0.9, 2, 3)
    assert (config.loss_type, config.save_total_limit) == ("dapo", 7)
    flags = make_parser("hrpo train")._option_string_actions
    assert {f"--{name}" for name in GRPOConfig.__dataclass_fields__ if GRPOConfig.__dataclass_fields__[name].init} <= (
        flags.keys()
    )
    for published, own in {"lr": "learning_rate", "optimizer": "optim", "group_size": "num_generations"}.items():
        assert flags[f"--{published}"] is flags[f"--{own}"]
    for published, own in {"warmup_ratio": "warmup_steps", "residual_r_min": "r_min"}.items():
        assert flags[f"--{published}"] is flags[f"--{own}"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format_reward", "0.1", "--reward_weights", "0.2", "0.8"], "both give weights of rewards"),
        (["--reward_weights", "1", "2", "3"], "needs one weight, the answer's, not "),
    ],
)
def test_weights_of_rewards_that_would_be_replaced_are_refused(flags, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        parse([*flags, "--dataset", data, "--output_dir", str(tmp_path / "run")])


def test_a_run_without_a_monitor_ends_well_and_is_reported_on(tmp_path):
    flags = run_of_sums(tmp_path, 6, max_steps=2, monitor="false", report="true", eval_problems=2)
    flags += ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--max_completion_length=8"]
    assert main([*flags, "--output_dir", str(tmp_path / "run")])["after"]["total"] == 2
    assert (tmp_path / "run" / "report.png").is_file() and not (tmp_path / "run" / "monitor.jsonl").exists()
    assert len([row for row in read_run(tmp_path / "run").rows if "loss" in row]) == 2


def test_least_squares_start_the_projection_from_what_the_base_writes(base, data, tmp_path, capsys):
    flags = ["--model_name", base, "--dataset", data, "--group_size", "2", *TINY]
    flags += [
        "--per_device_train_batch_size",
        "2",
        "--residual_scale",
        "embedding",
        "--r_min",
        "0.5",
        "--r_max",
        "0.9",
    ]
    main([*flags, "--projection_start", "lstsq", "--output_dir", str(tmp_path / "fitted")])
    assert "is left over" in capsys.readouterr().out
    start = load_file(tmp_path / "fitted" / "monitor_start.safetensors")
    (weight,) = start.values()
    assert 0.05 < weight.std() < 0.2  # a random one has 0.001
    for more in (["--projection_norm"], ["--projection_layers", "2"]):
        with pytest.raises(InputError, match="projection_start='lstsq'"):
            parse([*flags, "--projection_start", "lstsq", "--output_dir", str(tmp_path / "no"), *more])


def test_a_supervised_run_with_fillers_is_evaluated_as_one_that_does_not_think(tmp_path):
    arguments = {"residual": None, "lora_rank": 4, "task": "passing"}  # as `hrpo sft --residual none` records it
    (command,) = next_commands(arguments, tmp_path / "run", "Hi")
    assert "--no-thinking" in command and "--control" not in command


@pytest.mark.parametrize("residual", ["projection", "none"])
def test_the_end_of_a_run_names_commands_that_work(tmp_path, capsys, residual):
    words = run_of_sums(tmp_path, 2, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    words += ["--max_completion_length", "8", "--residual", residual, "--output_dir", str(tmp_path / "a run")]
    assert cli(["train", *words, "--shots", "1"]) == 0
    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.partition("next:\n")[2].splitlines()]
    expected = ["eval", "think", "merge"] if residual == "projection" else ["eval"]
    asked = commands[0][commands[0].index("--shots") :][:2], commands[0][commands[0].index("--max_new_tokens") :][:2]
    assert asked == (["--shots", "1"], ["--max_new_tokens", "8"])
    assert [words[1] for words in commands] == expected
    first = json.loads(Path(words[words.index("--dataset") + 1]).read_text().splitlines()[0])["question"]
    assert all(one[one.index("--prompt") + 1] == first for one in commands if one[1] == "think")
    for program, *words in commands:
        assert program == "hrpo" and cli(words) == 0, (words, capsys.readouterr().err)
