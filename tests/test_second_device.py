"""Thinking on a device that is not the CPU (`second_device.py`): the same numbers, no wait too many, nothing mixed."""

import json
from pathlib import Path

import processes
import pytest
from runs import small_trainer
from tiny import byte_tokenizer, tiny_model

PROGRAM = Path(__file__).with_name("on_second_device.py")
# Where a run of ours copies to or from the device, or waits for it: the ends of a rollout, the adjoint's norms of
# terms, numbers for the log, the reference's file, the monitor, and continuous batching's two lists of rows.
NAMED = {
    "hrpo_patches/engines/generate.py:complete",
    "hrpo_patches/thinking/adjoint.py:_number",
    "hrpo_patches/thinking/backbone.py:ratio_of",
    "hrpo_patches/thinking/continuous.py:_after",
    "hrpo_patches/thinking/continuous.py:_inputs",
    "hrpo_patches/thinking/continuous.py:take",
    "hrpo_patches/thinking/decoding.py:__init__",
    "hrpo_patches/thinking/decoding.py:start_thinking",
    "hrpo_patches/training/reference.py:on_train_begin",
    "hrpo_patches/training/trainer.py:_generate_single_turn",
    "hrpo_patches/training/trainer.py:_record",
    "hrpo_patches/training/trainer.py:_record_length",
}


def run(what, folder=".", device="second", fault="", check=True):
    done = processes.run(processes.script, PROGRAM, device, what, folder, *([fault] if fault else []))
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def unnamed(events):
    """The places of ours that were counted and that no list above names."""
    places = {name.rpartition(" in ")[2] for name in events} - {"upstream"} - NAMED
    return {place for place in places if not place.startswith("hrpo_patches/monitor/")}


@pytest.fixture(scope="module")
def generated():
    return run("generations")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run("trainings", folder / "cpu", "cpu"), run("trainings", folder / "second")


def test_a_replay_has_the_cpus_logits_and_gradients_and_waits_for_its_terms_alone():
    found = run("replays")
    assert len(found) == 8
    for name, one in found.items():
        assert max(one["off"]) < (1e-3 if name == "embedding sequential" else 1e-4), name
        ours = {place: count for place, count in one["events"].items() if "upstream" not in place}
        allowed = "sequential.py:decoded_states" if "sequential" in name else "adjoint.py:_number"
        assert all(allowed in place for place in ours) and (ours or name.endswith(" 0")), (name, ours)


def test_generate_has_the_cpus_tokens_and_waits_no_more_often_per_token_than_stock(generated):
    assert len(generated) == 6
    for name, one in generated.items():
        assert one["same"] and one["off"] < 1e-4 and one["thinking"] <= one["stock"], (name, one)


def test_training_has_the_cpus_losses_and_copies_nothing_inside_the_loss(trained):
    on_cpu, on_second = trained
    for name, one in on_second.items():
        for row, expected in zip(one["log"], on_cpu[name]["log"], strict=True):
            assert row == pytest.approx(expected, rel=2e-3, abs=1e-4), name
        assert not unnamed(one["events"]), name


def test_continuous_batching_copies_two_lists_of_rows_per_step_and_waits_for_none(trained):
    events = trained[1]["continuous"]["events"]
    ours = {name: count for name, count in events.items() if "continuous.py:_" in name}
    assert len(ours) == 2 and all(name.startswith("to the device") for name in ours)
    assert max(ours.values()) <= 2 * 10  # two rollouts of ten tokens


def test_a_saved_adapter_opens_thinks_is_evaluated_and_merged_on_the_device(tmp_path):
    base = tiny_model("llama", thinking=False)
    base.config.thinking = None
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    trainer = small_trainer(tmp_path / "run", model=str(tmp_path / "base"))
    trainer.save_model()
    found = run("uses", tmp_path)
    assert found["devices"] == ["second", "second"] and found["thought"] == 5
    assert set(found["answers"].values()) == {3} and len(found["answers"]) == 6


def test_a_model_over_two_devices_thinks_wherever_its_thinking_modules_are():
    found = run("split")
    assert set(found) == {"second:0", "second:1"}
    for same, off in found.values():
        assert same and off < 1e-4


def test_a_wait_in_each_decoding_step_would_be_seen():
    found = run("generations", fault="wait")
    assert all(one["thinking"] > one["stock"] for one in found.values())


@pytest.mark.parametrize(("what", "fault"), [("trainings", "cpu"), ("replays", "states")])
def test_tensors_on_two_devices_would_be_seen(what, fault, tmp_path):
    done = run(what, tmp_path, fault=fault, check=False)
    assert done.returncode != 0 and "a tensor of the CPU" in done.stderr
