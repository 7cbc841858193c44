"""Two processes, DDP and FSDP2, train as one process does: losses, gradients, checkpoints; on a CPU, with gloo."""

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from runs import run_of_sums
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM, Trainer

from hrpo_patches import load_adapter
from hrpo_patches.training.distributed import check_sharding
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import MODULES

# Until some release after 5.17, transformers asks torch for the device "cpu:0", which no file can be loaded to.
RESUMES = 'device.type != "cpu"' in inspect.getsource(Trainer._load_optimizer_and_scheduler)
resumes = pytest.mark.skipif(not RESUMES, reason="this transformers resumes several processes on GPUs only")
TESTS = Path(__file__).parents[1]
PRESETS = TESTS.parent / "configs" / "accelerate"
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # see the Makefile
ZERO = {
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(DEEPSPEED), os.environ.get("PYTHONPATH", "")]),
    "PATH": f"{DEEPSPEED / 'bin'}{os.pathsep}{os.environ['PATH']}",  # ninja: it builds an operation when it first runs
    "DS_ACCELERATOR": "cpu",
}


def case(name, lora, residual, bptt, **more):
    rates = {"learning_rate": 1e-3, "lr_thinking_projection": 1e-3}
    options = rates | {"residual": residual, "bptt": bptt, "bptt_tolerance": 1e-7, "max_steps": 2, "optim": "sgd"}
    options |= more.pop("options", {})
    return {"name": name, "lora": lora, "family": "llama", "options": options} | more


MATRIX = [
    case(f"{'lora' if lora else 'full'}-{residual}-{bptt}", lora, residual, bptt)
    for lora in (True, False)
    for residual in ("projection", "embedding")
    for bptt in ("0", "exact")
]
FURTHER = [
    case("truncated", True, "projection", "2"),
    case("truncated-of-distributions", False, "embedding", "2", family="qwen3"),
    case("tied", False, "projection", "0", model={"tie_word_embeddings": True}),
    case("tied-exact", False, "embedding", "exact", model={"tie_word_embeddings": True}, family="qwen2"),
    case("in-pieces", False, "projection", "0", logits=2000),
    case("in-pieces-tied", False, "projection", "exact", logits=2000, model={"tie_word_embeddings": True}),
    case("in-pieces-lora", True, "projection", "0", logits=2000),
    case("many-thoughts-lora", True, "embedding", "sequential", kept_thoughts=2),
    case("truncated-of-distributions-lora", True, "embedding", "2"),
    case("reference-in-pieces", False, "projection", "0", logits=2000, named=True, options={"beta": 0.5}),
    case("many-thoughts", False, "projection", "sequential", kept_thoughts=2),
    case("many-thoughts-of-distributions", False, "embedding", "sequential", kept_thoughts=2),
    case("checkpointed", True, "projection", "exact", options={"gradient_checkpointing": True}),
    case("reference-base", True, "projection", "0", options={"beta": 0.5}),
    case("reference-start", False, "projection", "0", options={"beta": 0.5, "reference": "start"}),
    case("reference-start-of-distributions", True, "embedding", "0", options={"beta": 0.5, "reference": "start"}),
    case("two-layers", False, "projection", "0", thinking={"projection_layers": 2, "projection_norm": True}),
    case("forced", True, "projection", "0", thinking={"thoughts": 3}),
    case("four-groups", True, "projection", "exact", options={"num_generations": 2}),
    case("accumulated", False, "projection", "0", options={"gradient_accumulation_steps": 2}),
    case("twice", True, "projection", "0", options={"num_iterations": 2}),
    case("twice-exact", True, "projection", "exact", options={"num_iterations": 2}),
]
CASES = MATRIX + FURTHER
# DDP holds whole weights, as one process does: of the further cases, those in which its hooks see something else.
IN_DDP = ["tied", "in-pieces", "many-thoughts", "checkpointed", "reference-start", "four-groups", "accumulated"]
OF_DDP = [case for case in CASES if case in MATRIX or case["name"] in [*IN_DDP, "twice-exact"]]
PAIRS = [(preset, case["name"]) for preset, cases in (("ddp", OF_DDP), ("fsdp2", CASES)) for case in cases]


def environment(preset):
    """What `accelerate launch --config_file PRESET` tells its processes."""
    words = ["--config_file", str(PRESETS / f"{preset}.yaml"), "--num_processes", "2", "script.py"]
    args, preset, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.main_process_port = 0
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(preset.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def launch(folder, name, cases, preset=None, status=0, **more):
    """Run cases in one process, or in two with a preset; returns where their results are."""
    job = folder / f"{name}.job.json"
    job.write_text(json.dumps({"out": str(folder / name), "cases": cases} | more))
    shared = dict(os.environ) if preset is None else environment(preset)
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = processes.script
    if (preset or "").startswith("zero"):  # a library that others look for when they are imported
        shared, program = shared | ZERO, processes.fresh
    probe = (program, TESTS / "several_probe.py", job)
    if preset is None:
        codes = processes.wait([processes.start(*probe, out=folder / f"{name}.0.log", environment=shared)])
    else:
        codes = processes.each_rank(*probe, folder=folder, name=name, environment=shared)
    said = [file.read_text()[-4000:] for file in sorted(folder.glob(f"{name}.?.log"))]
    assert set(codes) == {status} or (status is None and all(codes)), said
    return folder / name


def uneven(record):
    """The second process's completions end early, and one of all does not think: its shapes are others."""
    for name, tokens in record.items():
        if name.endswith(".tokens"):
            mask, half = record[name.replace("tokens", "mask")], len(tokens) // 2
            for row in range(half, len(tokens)):
                tokens[row, 3 + row % 3 :] = -1
                mask[row, 3 + row % 3 :] = False
            mask[half] = False
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


def half(case):
    size = case["options"].get("per_device_train_batch_size", 8) // 2
    return case | {"options": case["options"] | {"per_device_train_batch_size": size}}


@pytest.fixture(scope="module")
def recorded(folder):
    """The cases with rollouts that one process made, and where it trained with them."""
    kept = {case["name"]: folder / f"{case['name']}.record" for case in CASES}
    tiny_model("llama", thinking=None, initializer_range=0.1).save_pretrained(folder / "named")
    launch(folder, "first", [case | {"keep": str(kept[case["name"]])} for case in CASES])
    for file in kept.values():
        save_file(uneven(load_file(file)), file)
    cases = [case | {"record": str(kept[case["name"]])} for case in CASES]
    return cases, launch(folder, "one", cases)


@pytest.fixture(scope="module")
def ddp(folder, recorded):
    names = [case["name"] for case in OF_DDP]
    return launch(folder, "ddp", [half(case) for case in recorded[0] if case["name"] in names], "ddp")


@pytest.fixture(scope="module")
def fsdp2(folder, recorded):
    return launch(folder, "fsdp2", list(map(half, recorded[0])), "fsdp2")


@pytest.mark.parametrize(("preset", "name"), PAIRS)
def test_two_processes_have_the_losses_and_gradients_of_one(preset, name, recorded, request):
    two, one = (load_file(path / f"{name}.safetensors") for path in (request.getfixturevalue(preset), recorded[1]))
    assert two.keys() == one.keys()
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-5)
    kinds = {key.partition(".")[0] for key in one}
    assert kinds == {"losses", "start", "gradient", "weight"}
    for key, value in one.items():
        error = (two[key] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 1e-5, (key, error)


STEPS = {"max_steps": 3, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
SAVED = [
    case("saved-lora", True, "projection", "0", options=STEPS),
    case("saved-full", False, "embedding", "0", options=STEPS),
    case("saved-tied", False, "projection", "0", options=STEPS, model={"tie_word_embeddings": True}),
    case("saved-with-its-start", False, "projection", "0", options=STEPS | {"beta": 0.5, "reference": "start"}),
]


def of(preset, cases):
    """The cases with a batch for so many processes as the preset has."""
    return cases if preset is None else list(map(half, cases))


@pytest.fixture(scope="module")
def saved(folder):
    """Three steps of AdamW by one process and by two, each saved, with the same rollouts; by preset."""
    kept = {case["name"]: folder / f"{case['name']}.record" for case in SAVED}
    launch(folder, "first-saved", [case | {"keep": str(kept[case["name"]])} for case in SAVED])
    cases = [case | {"record": str(kept[case["name"]])} for case in SAVED]
    wholes = {name: launch(folder, f"{name}-saved", of(name, cases), name) for name in (None, "ddp", "fsdp2")}
    return cases, wholes


def files_of(checkpoint):
    return sorted(path.name for path in checkpoint.iterdir() if not path.name.startswith("rng_state"))


CHANGES = [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp2"), ("fsdp2", None)]


@resumes
@pytest.mark.parametrize(("begun", "resumed"), CHANGES)
def test_a_run_is_resumed_by_other_processes_as_if_it_had_not_been_interrupted(begun, resumed, saved, folder):
    cases, wholes = saved
    further, after = folder / f"{begun}-to-{resumed}", []
    for case in cases:
        shutil.copytree(wholes[begun] / case["name"], further / case["name"])
        shutil.rmtree(further / case["name"] / "checkpoint-3")
        after.append(case | {"resume": str(further / case["name"] / "checkpoint-2")})
    launch(folder, further.name, of(resumed, after), resumed)
    for name in (case["name"] for case in cases):
        there, whole = load_file(further / f"{name}.safetensors"), load_file(wholes[begun] / f"{name}.safetensors")
        compared = [key for key in whole if key.startswith(("weight.", "gradient.3."))]
        assert {key.partition(".")[0] for key in compared} == {"weight", "gradient"}
        for key in compared:
            error = (there[key] - whole[key]).norm() / whole[key].norm().clamp(min=1e-6)
            assert error < 1e-5, (name, key, error)
        assert files_of(further / name / "checkpoint-3") == files_of(wholes[None] / name / "checkpoint-3")


ZEROS = [pytest.param(name, marks=pytest.mark.deepspeed) for name in ("zero2", "zero3")]


@pytest.mark.parametrize("preset", ["ddp", *ZEROS[1:]])
def test_a_launch_with_a_preset_reaches_the_script(preset):
    words = ["launch", "--config_file", str(PRESETS / f"{preset}.yaml"), "--num_processes", "2"]
    script = str(TESTS.parent / "scripts" / "hrpo_gsm8k.py")
    command = [str(Path(sys.executable).with_name("accelerate")), *words, "--main_process_port", "0", script, "--help"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{ZERO['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ZERO | {"PATH": path})
    assert done.returncode == 0, done.stderr
    assert "--lr_thinking_projection" in done.stdout


def test_thinking_modules_compute_in_float32_where_the_others_do_in_bfloat16(folder):
    cases = [case("half", False, "projection", "exact", options={"bf16": True, "max_steps": 1})]
    seen = json.loads((launch(folder, "half", of("fsdp2", cases), "fsdp2") / "half.json").read_text())
    assert seen["dtypes"] == {
        "LlamaRMSNorm": "torch.bfloat16",
        "ThinkingLinear": "torch.float32",
        "ThinkingLambda": "torch.float32",
    }
    assert seen["log"][0]["projection/grad_norm"] > 0 and math.isfinite(seen["log"][0]["loss"])


@pytest.mark.parametrize("residual", ["projection"])
def test_rollouts_of_continuous_batching_and_the_best_checkpoint_are_had_in_shards(residual, folder):
    options = STEPS | {"use_transformers_continuous_batching": True}
    cases = [case("packed", True, residual, "exact", options=options, best="checkpoint-1")]
    out = launch(folder, "packed", of("fsdp2", cases), "fsdp2")
    held, first = (
        load_file(out / "packed.safetensors"),
        load_file(out / "packed" / "checkpoint-1" / "adapter_model.safetensors"),
    )
    for name, value in first.items():
        (key,) = [key for key in held if key.startswith("weight.") and plain_name(key) == f"weight.{name}"]
        assert torch.equal(held[key], value), name
    log = json.loads((out / "packed.json").read_text())["log"]
    assert all(0.5 < row["embeds_ratio"] < 1 for row in log if "loss" in row)


def plain_name(key):
    return key.replace(".modules_to_save.default", "").replace(".default", "")


def asked(**options):
    from_start = options.get("reference") == "start" and options.get("beta", 0.1) != 0
    return SimpleNamespace(**{"residual": "projection", "bptt": 0, "from_start": from_start} | options)


def test_what_shards_cannot_do_is_refused():
    first, second, third = (
        SimpleNamespace(fsdp_version=1),
        SimpleNamespace(fsdp_version=2),
        SimpleNamespace(zero_stage=3),
    )
    check_sharding(asked(residual=None), first, None)
    with pytest.raises(InputError, match="set fsdp_version: 2"):
        check_sharding(asked(), first, None)
    for args in (asked(reference="start"), asked(bptt=2)):
        check_sharding(args, second, None)
        check_sharding(args, None, SimpleNamespace(zero_stage=2))
    with pytest.raises(InputError, match="ZeRO-2 or FSDP2"):
        check_sharding(asked(reference="start"), None, third)
    with pytest.raises(InputError, match="bptt=2 is not supported by ZeRO-3"):
        check_sharding(asked(bptt=2), None, third)


@pytest.mark.parametrize("bptt", [None, "exact"])
def test_zero_3_decodes_for_the_exact_gradient_and_says_so(bptt, caplog):
    args = asked(bptt=bptt)
    check_sharding(args, None, SimpleNamespace(zero_stage=3))
    assert args.bptt == "sequential" and "decoding the thoughts one by one" in caplog.text


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


OTHERS = ("many-thoughts", "many-thoughts-lora", "truncated-of-distributions-lora")
ALSO = ("tied", "in-pieces", "in-pieces-lora", *OTHERS)
BIG = {"learning_rate": 1e-2, "lr_thinking_projection": 1e-1, "lr_residual_gate": 1.0, "lr_residual_Lambda": 1.0}
TRUNCATED = "truncated-of-distributions-lora"  # which ZeRO-3 refuses
STEPPED = [
    one | {"options": one["options"] | BIG | {"max_steps": 1}}  # steps that are large beside a weight's last digit
    for one in [*MATRIX, *(one for one in FURTHER if one["name"] in ALSO)]
]


HALF = case("half", True, "projection", "0", options={"bf16": True, "max_steps": 2, "optim": "adamw_torch"})


@pytest.fixture(scope="module")
def one_step(folder, recorded):
    """What one process without DeepSpeed makes of the cases, and these with their rollouts."""
    records = {one["name"]: one["record"] for one in recorded[0]}
    cases = [one | {"record": records[one["name"]]} for one in STEPPED]
    return cases, launch(folder, "one-step", cases)


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def zero(request, folder, one_step, saved):
    """What DeepSpeed's processes make of them, of runs that save, of their resumption and of bfloat16."""
    steps = [one for one in one_step[0] if (request.param, one["name"]) != ("zero3", TRUNCATED)]
    saves = [one for one in saved[0] if one["name"] != "saved-with-its-start"]
    resumed = [
        one | {"name": f"{name}-resumed", "resume": str(folder / request.param / name / "checkpoint-2")}
        for one in saves
        for name in [one["name"]]
    ]
    return launch(folder, request.param, of(request.param, [*steps, *saves, *resumed, HALF]), request.param)


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", [case["name"] for case in STEPPED])
def test_deepspeed_takes_the_step_that_one_process_takes(name, zero, one_step):
    if (zero.name, name) == ("zero3", TRUNCATED):
        return
    two, one = (load_file(path / f"{name}.safetensors") for path in (zero, one_step[1]))
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-5)
    weights = [key for key in one if key.startswith("weight.")]
    assert any("thinking_residual_Lambda" in key for key in weights)
    for key in weights:  # DeepSpeed hands no gradients out; plain gradient descent shows them
        step = one[key] - one[key.replace("weight.", "start.", 1)]
        error = (two[key] - one[key]).norm() / step.norm()
        assert error < 1e-3, (key, error)


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", [case["name"] for case in SAVED if case["name"] != "saved-with-its-start"])
def test_deepspeed_resumes_its_own_checkpoints_and_writes_files_that_one_process_loads(name, zero, saved):
    there, then = (load_file(zero / f"{run}.safetensors") for run in (f"{name}-resumed", name))
    alone = load_file(saved[1][None] / f"{name}.safetensors")
    for key in (key for key in then if key.startswith("weight.")):
        torch.testing.assert_close(there[key], then[key], rtol=0, atol=0)
        assert (then[key] - alone[key]).norm() < 1e-4 * alone[key].norm(), key
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    ours, theirs = (load_file(path / name / file) for path in (zero, saved[1][None]))
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}  # of tied weights ZeRO-3 writes both
    assert all((ours[key] - value).norm() <= 1e-4 * value.norm() for key, value in theirs.items())


@pytest.mark.deepspeed
def test_deepspeed_in_bfloat16_trains_thinking_weights_that_compute_in_it(zero):
    assert set(json.loads((zero / "half.json").read_text())["dtypes"].values()) == {"torch.bfloat16"}
    held = load_file(zero / "half.safetensors")
    moved = {key for key in held if key.startswith("weight.") and not torch.equal(held[key], held[f"start.{key[7:]}"])}
    assert all(any(part in key for key in moved) for part in (*MODULES, "lora_A", "lora_B"))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(folder):
    options = {"group_size": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr": 1e-3}
    options |= {"max_completion_length": 24, "temperature": 1, "max_steps": 4, "save_steps": 1, "eval_problems": 5}
    return ["train", *run_of_sums(folder, 5, **options)]


def train(folder, name, words, preset, **more):
    launch(folder, name, [], preset, train=[*words, "--output_dir", str(folder / name / "run")], **more)
    return folder / name / "run"


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def trained(request, folder, words):
    return request.param, train(folder, f"train-{request.param}", words, request.param)


def test_the_command_trains_in_two_processes_and_says_everything_once(trained, folder):
    preset, out = trained
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["total"] == report["after"]["total"] == 5
    rows = [json.loads(line) for line in (out / "monitor.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    logs = [(folder / f"train-{preset}.{rank}.log").read_text() for rank in (0, 1)]
    assert "saved in" in logs[0] and "backend:" in logs[0]
    assert not any(text in logs[1] for text in ("saved in", "backend:", "Answering"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert load_adapter(base, out).generation_config.thinking


@pytest.mark.deepspeed
def test_the_command_trains_under_zero_2_and_refuses_zero_3(folder, words):
    out = train(folder, "train-zero2", [*words, "--max_steps", "2"], "zero2")
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["total"] == report["after"]["total"] == 5
    train(folder, "train-zero3", words, "zero3", status=2)
    assert "error: ZeRO-3 sharded this model when it was loaded" in (folder / "train-zero3.0.log").read_text()


@resumes
def test_a_run_of_which_one_process_is_told_to_end_goes_on_as_if_it_had_not_been(trained, folder, words):
    preset, whole = trained
    name = f"told-{preset}"
    out = train(folder, name, [*words, "--save_steps", "100"], preset, status=143, signal=["SIGTERM", 1, 2])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert_resumes_as_the_whole(preset, out, whole, folder, words)


@resumes
def test_when_a_process_is_killed_the_others_end_and_the_run_goes_on_as_if_it_had_not_been(trained, folder, words):
    preset, whole = trained
    out = train(folder, f"killed-{preset}", words, preset, status=None, signal=["SIGKILL", 1, 2])
    assert (out / "checkpoint-2" / "trainer_state.json").is_file() and not (out / "report.json").exists()
    assert_resumes_as_the_whole(preset, out, whole, folder, words)


def assert_resumes_as_the_whole(preset, out, whole, folder, words):
    train(folder, out.parent.name, [*words, "--resume_from_checkpoint", "latest"], preset)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (out, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())
