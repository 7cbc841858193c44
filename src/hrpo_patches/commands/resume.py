"""Which checkpoint a run resumes from, and whether it is whole, of this run, and not its last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hrpo_patches.files import LOCK, replace
from hrpo_patches.tasks.prompts import RUN_FILE, TEMPLATE, Prompt
from hrpo_thinking.errors import InputError

# What makes two runs different ones: other data, in another order, or another model. The options of thinking are
# compared with what the checkpoint's weights say (`record.check_same_thinking`).
FIXED = (
    "model_name",
    "adapter",
    "task",
    "dataset",
    "corpus",
    "limit",
    "seed",
    "prompt",
    "shots",
    "examples",
    "max_prompt_length",
    "eval_problems",
    "lora_rank",
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "chat_template_kwargs",
)
# What may be missing in no checkpoint, and the names that it may have there, FSDP2's and DeepSpeed's among them.
STATE = {
    "weights": ("*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    "the optimizer's state (optimizer.pt)": ("optimizer*", "global_step*"),
    "the learning rate's state (scheduler.pt)": ("scheduler.pt", "global_step*"),
    "random states (rng_state.pth)": ("rng_state*",),
}


def write_record(config: TrainingArguments, record: dict[str, Any], template: Prompt) -> None:
    """Keep what a run was started with in its folder, for `check_output` when it is resumed.

    Args:
        config: of the run.
        record: what it is asked for, by flag.
        template: its prompt around `QUESTION`, for `prompt_as_trained`.
    """
    file = Path(str(config.output_dir)) / RUN_FILE
    if config.process_index == 0 and not (config.resume_from_checkpoint and file.is_file()):
        for path in file.parent.iterdir():
            if path.name.startswith("monitor") and _is_leftover(path):
                path.unlink()
        replace(file, json.dumps(record | {TEMPLATE: template}, indent=1, default=str) + "\n")


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's `trainer_state.json` holds; an `InputError` if it is damaged."""
    return _read(checkpoint / "trainer_state.json")


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(
            f"{file} is not valid JSON ({error}). Resume from an earlier checkpoint, or use another --output_dir."
        ) from None
    return found


def check_output(config: TrainingArguments, record: dict[str, Any]) -> Path | None:
    """The checkpoint that a run resumes from, if it is to be resumed.

    Args:
        config: of the run: `output_dir`, `resume_from_checkpoint` (a folder, or "latest") and how long it trains.
        record: what the run is asked for, by flag.

    Raises:
        InputError: the folder holds another run, or the checkpoint is missing, incomplete, or has all steps.
    """
    folder, resumed = Path(str(config.output_dir)), config.resume_from_checkpoint
    if folder.is_file():
        raise InputError(f"--output_dir {folder} is a file.")
    holds = folder.is_dir() and any(not _is_leftover(path) for path in folder.iterdir())
    if resumed is None:
        if holds:
            raise InputError(
                f"{folder} already holds a run; give another --output_dir, or resume it by "
                f"--resume_from_checkpoint latest."
            )
        return None
    if resumed == "latest":
        last = last_checkpoint(folder) if holds else None
        if last is None:
            raise InputError(f"{folder} holds no checkpoint to resume from.")
        resumed = str(last)
    checkpoint = Path(resumed)
    if not (checkpoint / "trainer_state.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint: it has no trainer_state.json.")
    if holds and checkpoint.resolve().parent != folder.resolve():
        raise InputError(f"{folder} already holds another run than the checkpoint {checkpoint}.")
    for what, names in STATE.items():
        if not any(path for name in names for path in checkpoint.glob(name)):
            raise InputError(
                f"{checkpoint} is incomplete: {what} is missing, and without it a resumed run is another one. Resume "
                f"from an earlier checkpoint."
            )
    _check_same_run(checkpoint.parent / RUN_FILE, record)
    step = _last_step(checkpoint, config)
    if step is not None and (folder / "report.json").is_file():
        raise InputError(
            f"{folder} is complete: {step} steps, and report.json. To train further, give a larger --max_steps (or "
            f"--num_train_epochs)."
        )
    return checkpoint


def _is_leftover(path: Path) -> bool:
    """Whether a run that was refused before its first step left this behind."""
    if path.name == "monitor.jsonl":
        return path.read_text().count("\n") <= 1  # of step 0
    return path.name in (LOCK, RUN_FILE, "monitor_start.safetensors")


def _same(kept: object, asked: object) -> bool:
    """Whether two values are equal, or two paths of the same file."""
    if kept == asked or not (isinstance(kept, str) and isinstance(asked, str)):
        return bool(kept == asked)
    return Path(kept).exists() and Path(kept).resolve() == Path(asked).resolve()


def _check_same_run(file: Path, record: dict[str, Any]) -> None:
    """Raise `InputError` if the run that wrote `file` had other data or another model; say what else differs."""
    if not file.is_file():  # written from 0.3 on
        return
    kept, asked = _read(file), json.loads(json.dumps(record, default=str))
    kept.pop(TEMPLATE, None)
    differ = [name for name in {**kept, **asked} if not _same(kept.get(name), asked.get(name))]
    for name in differ:
        if name in FIXED:
            raise InputError(
                f"{file.parent} was started with --{name} {kept.get(name)}, not {asked.get(name)}; resume it with the "
                f"same value, or start another run in another --output_dir."
            )
    for name in sorted(set(differ) - {"resume_from_checkpoint", "output_dir"}):
        print(f"resumed with --{name} {asked.get(name)}; started with {kept.get(name)}.")


def _last_step(checkpoint: Path, config: TrainingArguments) -> int | None:
    """The step of a checkpoint after which nothing is left to train; None where something is."""
    state = state_of(checkpoint)
    curriculum = (state.get("stateful_callbacks") or {}).get("Curriculum", {}).get("attributes", {})
    patience = getattr(config, "patience", 0)
    if config.max_steps > 0:
        done = state["global_step"] >= config.max_steps
    else:
        done = (state.get("epoch") or 0) >= config.num_train_epochs - 1e-6
    done = done or (patience > 0 and curriculum.get("waited", 0) >= patience)
    return state["global_step"] if done else None


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; a save that was cut short is skipped with a message."""
    numbered = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())  # the last file that a save writes
            return path
        except (OSError, ValueError):
            print(f"{path} is incomplete, as a save that was cut short leaves it: skipped.")
    return None
