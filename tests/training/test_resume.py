"""A run that was killed and resumed is the run that was not: same weights, same log, bit for bit on a CPU."""

import json
import signal

import processes
import pytest
import torch
from runs import run_of_sums, small_trainer
from safetensors.torch import load_file
from tiny import tiny_model

STEPS = 6  # of four an epoch, so the run ends in its second
METHODS = {"between": "training_step", "saving": "_save_rng_state"}


def run(*words):
    return processes.run(processes.hrpo, "train", *words)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    given = {"group_size": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lr": 1e-3}
    given |= {"max_completion_length": 8, "temperature": 1, "beta": 0.5, "projection_dropout": 0.3}
    given |= {"examples": "2+3?\n5 #### 5", "save_steps": 1, "max_steps": STEPS}
    return run_of_sums(tmp_path_factory.mktemp("resume"), 4, **given)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(*options, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def log_of(folder):
    """Everything that was logged but for times."""
    rows = json.loads((folder / "report.json").read_text())["log"]
    return [
        {key: value for key, value in row.items() if "time" not in key and "per_second" not in key} for row in rows
    ]


@pytest.mark.parametrize(("when", "step", "last"), [("between", 3, 3), ("between", 5, 5), ("saving", 5, 4)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(options, whole, tmp_path, when, step, last):
    folder = tmp_path / "run"
    words = [*options, "--output_dir", folder]
    killed = processes.run(processes.signalled, "SIGKILL", "HRPOTrainer", METHODS[when], step, "train", *words)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / f"checkpoint-{last}" / "trainer_state.json").is_file()
    assert (folder / f"checkpoint-{step}").is_dir() and not (folder / "report.json").exists()
    resumed = run(*options, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert (f"checkpoint-{step} is incomplete" in resumed.stdout) == (when == "saving")
    assert_same_run(folder, whole)


def assert_same_run(folder, whole):
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert log_of(folder)[:STEPS] == log_of(whole)[:STEPS]


def test_a_run_that_is_told_to_end_saves_its_step_says_so_and_goes_on_as_if_it_had_not_been(options, whole, tmp_path):
    folder = tmp_path / "run"
    words = ["train", *options, "--save_steps", 100, "--output_dir", folder]
    told = processes.run(processes.signalled, "SIGTERM", "HRPOTrainer", "training_step", 3, *words)
    assert told.returncode == 143, told.stderr  # 128 + SIGTERM
    assert "SIGTERM received: saved after step 4; resume by --resume_from_checkpoint latest." in told.stdout
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (folder / "report.json").exists()
    resumed = run(*options, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(folder, whole)


def test_a_run_that_goes_on_from_an_adapter_resumes_with_its_forced_thoughts_and_with_no_others(options, tmp_path):
    taught = run(*options, "--max_steps", 1, "--thoughts", 3, "--filler", "~", "--output_dir", tmp_path / "taught")
    assert taught.returncode == 0, taught.stderr
    further = [*options, "--adapter", tmp_path / "taught", "--output_dir", tmp_path / "further"]
    assert run(*further, "--max_steps", 1).returncode == 0
    again = [*further, "--max_steps", 2, "--resume_from_checkpoint", "latest"]
    other = run(*again, "--thoughts", 2)
    assert other.returncode != 0 and "was trained with --thoughts 3, not 2" in other.stderr
    resumed = run(*again)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "further" / "thinking_config.json").read_text())["thoughts"] == 3


def test_a_plain_run_resumes_with_its_pauses_only(options, tmp_path):
    plain = [*options, "--residual", "none", "--projection_dropout", 0, "--output_dir", tmp_path / "plain"]
    assert run(*plain, "--thoughts", 3, "--max_steps", 1).returncode == 0
    other = run(*plain, "--max_steps", 2, "--thoughts", 2, "--resume_from_checkpoint", "latest")
    assert other.returncode != 0 and "was trained with --thoughts 3, not 2" in other.stderr


def test_the_embedding_scale_is_measured_before_training_can_change_the_table(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": None, "beta": 0.0}

    def trainer():
        return small_trainer(
            tmp_path, model=tiny_model("llama", thinking={"residual_scale": "embedding"}), learning_rate=0.1, **options
        )

    straight = trainer()
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    table = resumed.model.get_input_embeddings().weight
    assert abs(table.norm(dim=-1).mean().item() - resumed.model.config.thinking["embedding_norm"]) > 1e-3
