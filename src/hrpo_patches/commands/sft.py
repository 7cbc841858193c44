"""`hrpo sft`: supervised latent training, from a command line to an adapter that thinks; does no maths itself."""

from __future__ import annotations

import time
from argparse import SUPPRESS
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers import set_seed
from trl import TrlParser

from hrpo_patches.commands.flags import (
    TRACKERS,
    Written,
    add_first_flags,
    add_thinking_flags,
    option,
    parser_of,
    published,
    read,
    with_config,
)
from hrpo_patches.commands.refusals import in_a_sentence
from hrpo_patches.commands.resume import check_output, write_record
from hrpo_patches.commands.train import LORA_TARGETS, asker, finish, train_and_save
from hrpo_patches.commands.train_flags import REST, ProblemArguments, check_run, own_names
from hrpo_patches.device import has_bf16
from hrpo_patches.engines.batches import Decoding, completions
from hrpo_patches.evaluation.statistics import standard_error
from hrpo_patches.files import alone
from hrpo_patches.models.base import load_model
from hrpo_patches.models.record import check_same_thinking
from hrpo_patches.tasks.base import Task
from hrpo_patches.tasks.problems import find_task, split_held_out
from hrpo_patches.tasks.prompts import QUESTION, prompt_ids, with_prompts
from hrpo_patches.tasks.rewards import grade
from hrpo_patches.tasks.worked import worked_problems
from hrpo_patches.training.config import ThinkingArguments
from hrpo_patches.training.lessons import Lesson, lesson_of
from hrpo_patches.training.sft import HRPOSFTTrainer
from hrpo_patches.training.sft_config import DEFAULTS, SCALE, HRPOSFTConfig
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.marker import marker_table
from hrpo_thinking.parts import PROJECTION, parts_of, spelled

PROG, ALL = "hrpo sft", "--help_all"
HIDDEN = ("thinking", "thoughts", "replay_passes")  # flags of their own, what follows from the stage, deprecated
_GPU = torch.cuda.is_available()


@dataclass
class SFTArguments(ProblemArguments):
    """What a supervised run is about, beside its training arguments."""

    dataset: str | None = option(
        None,
        "Hub id, .jsonl file or folder of worked solutions: question, steps (a list) and answer, or GSM8K's form.",
    )
    limit: int | None = option(None, "Only the first so many solutions.")
    lora_rank: int = option(32, "LoRA rank; alpha is twice as much. 0 trains all weights.")
    eval_problems: int = option(0, "Held-out problems that are answered greedily in each evaluation.")


@dataclass
class SFTFlags(HRPOSFTConfig):
    """`HRPOSFTConfig` with the defaults of `hrpo sft`."""

    _argument_group_name = "training: transformers' arguments, and how steps become thoughts"

    thinking: dict[str, Any] | None = field(default=None, metadata={"help": SUPPRESS})  # each option is a flag
    output_dir: str | None = published(HRPOSFTConfig, "output_dir", "runs/sft")
    learning_rate: float = published(HRPOSFTConfig, "learning_rate", 1e-4, "--lr")
    lr_scheduler_type: str = published(HRPOSFTConfig, "lr_scheduler_type", "constant_with_warmup")
    warmup_steps: float = published(HRPOSFTConfig, "warmup_steps", 20)
    per_device_train_batch_size: int = published(HRPOSFTConfig, "per_device_train_batch_size", 8)
    gradient_accumulation_steps: int = published(HRPOSFTConfig, "gradient_accumulation_steps", 1)
    max_steps: int = published(HRPOSFTConfig, "max_steps", -1)
    num_train_epochs: float = published(HRPOSFTConfig, "num_train_epochs", 3)
    max_grad_norm: float = published(HRPOSFTConfig, "max_grad_norm", 1.0)
    seed: int = published(HRPOSFTConfig, "seed", 42)
    optim: str = published(HRPOSFTConfig, "optim", "adamw_torch")
    save_steps: float = published(HRPOSFTConfig, "save_steps", 250)
    save_total_limit: int | None = published(HRPOSFTConfig, "save_total_limit", 3)
    eval_steps: float | None = published(HRPOSFTConfig, "eval_steps", 250)
    logging_steps: float = published(HRPOSFTConfig, "logging_steps", 10)
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' for the last in output_dir.")
    report_to: list[str] = field(default_factory=lambda: ["none"], metadata=TRACKERS)
    use_cpu: bool = published(HRPOSFTConfig, "use_cpu", not _GPU)
    bf16: bool = published(HRPOSFTConfig, "bf16", has_bf16())
    dataloader_pin_memory: bool = published(HRPOSFTConfig, "dataloader_pin_memory", _GPU)


@dataclass
class SFTRun:
    """All that a command line says.

    Attributes:
        about: what the run is about.
        config: of the trainer.
        words: of the command line.
        question: that of the first problem, once the problems are read.
    """

    about: SFTArguments
    config: SFTFlags
    words: Written = field(default_factory=list)
    question: str = ""

    def check(self) -> None:
        """Raise `InputError` for whatever can be known to be wrong before any work."""
        about, config = self.about, self.config
        for name in ("max_prompt_length", "eval_batch_size"):
            require(getattr(about, name) >= 1, f"--{name} must be at least 1, not {getattr(about, name)}.")
        require(about.lora_rank >= 0, f"--lora_rank must be at least 0, not {about.lora_rank}.")
        require(about.limit is None or about.limit >= 1, f"--limit must be at least 1, not {about.limit}.")
        require(
            not config.patience or about.eval_problems,
            "--patience requires --eval_problems, whose accuracy it watches.",
        )
        check_run(config, about, about.model_name if about.lora_rank else None)
        checkpoint = check_output(config, self.record())
        if checkpoint is not None:
            config.resume_from_checkpoint = str(checkpoint)
            check_same_thinking(checkpoint, spelled(config.residual), self.thinking(), same_thoughts=False)

    def thinking(self) -> ThinkingConfig | None:
        """How the model is to think; None where it has fillers alone."""
        return ThinkingConfig.from_dict(self.config.chosen) if self.config.residual is not None else None

    def record(self) -> dict[str, Any]:
        """What the run was asked for, by flag: all but transformers' arguments that are as by default."""
        fields = HRPOSFTConfig.__dataclass_fields__
        ours = {*HRPOSFTConfig.__annotations__, *ThinkingArguments.__annotations__, *SFTFlags.__annotations__}
        flags = self.config.to_dict()
        own = {n: value for n, value in flags.items() if n in ours or (n in fields and value != fields[n].default)}
        return asdict(self.about) | {k: v for k, v in own.items() if not k.startswith("_")}


def make_parser(whole: bool = False) -> TrlParser:
    """The parser of the command; its help leaves transformers' own flags out, unless it is to be `whole`."""
    text = "Teach a model to think where it would write steps, from worked solutions."
    parser = parser_of(SFTArguments, SFTFlags, prog=PROG, description=text)
    add_first_flags(parser)
    add_thinking_flags(parser, REST, **DEFAULTS | SCALE)
    parser.add_argument(ALL, action="help", help="Show transformers' own options, too, all of which are flags.")
    kinds = (ProblemArguments, SFTArguments, SFTFlags, HRPOSFTConfig, ThinkingArguments)
    own = {name for kind in kinds for name in kind.__annotations__} | {*REST, "help", "help_all", "config"}
    for action in parser._actions:
        if (action.dest not in own and not whole) or action.dest in HIDDEN:
            action.help = SUPPRESS
    return parser


def parse(words: Written) -> SFTRun:
    """The run that a command line asks for, checked.

    Raises:
        InputError: a flag is not known, or something that it asks for cannot work.
    """
    parser = make_parser(whole=ALL in words)
    with in_a_sentence(words, own_names()):
        about, config, more = read(parser, words)
    options = {name: getattr(more, name) for name in REST}
    run = SFTRun(about, _with_options(config, options), words)
    run.check()
    return run


def _with_options(config: SFTFlags, options: dict[str, Any]) -> SFTFlags:
    """The arguments, with the options of thinking that have flags of their own."""
    if config.residual is None:
        defaults = {name: getattr(ThinkingConfig, name) for name in REST} | DEFAULTS | SCALE
        changed = [name for name, value in options.items() if value != defaults[name]]
        if config.gate != HRPOSFTConfig.gate:
            changed.append("gate")
        if changed:
            raise InputError(f"--{changed[0]} is about thinking; it cannot be combined with --residual none.")
        return config
    projected = PROJECTION in parts_of(config.residual)
    unused = [] if projected else [name for name in SCALE if options[name] == SCALE[name]]  # which are its defaults
    config.thinking = (config.thinking or {}) | {k: v for k, v in options.items() if k not in unused}
    config.read_thinking()
    config.check_start()
    return config


def main(words: Written) -> dict[str, Any]:
    """Train from a command line, save the adapter (or model) and `report.json`; returns the report.

    Raises:
        InputError: before any training, if the run cannot work.
        SystemExit: with `termination.STATUS`, after SIGTERM; a checkpoint of the last step is saved.
    """
    run = parse(with_config(words))
    first = run.config.process_index == 0
    with alone(Path(str(run.config.output_dir))) if first else nullcontext():
        return trained(run)


def make_trainer(run: SFTRun) -> tuple[HRPOSFTTrainer, Task, list[dict[str, Any]]]:
    """The trainer of a run, its task, and its held-out problems with their prompts (which may be none).

    Raises:
        InputError: something of the run's data, model or options cannot work.
    """
    about, config = run.about, run.config
    task = find_task(about.task, about.dataset, about.limit or 10_000, config.seed)
    problems: list[Any] = worked_problems(task, about.dataset, "train", config.answer_start)[: about.limit]
    train, held_out = split_held_out(problems, about.eval_problems, config.seed)
    set_seed(config.seed)
    model, tokenizer = load_model(about.model_name, run.thinking())
    marker_table(tokenizer, config.answer_start)
    ask = asker(run, task, tokenizer)
    rows, held_out_rows = (with_prompts(part, ask, tokenizer, about.max_prompt_length) for part in (train, held_out))
    run.question = rows[0]["question"]

    def lesson(row: dict[str, Any]) -> Lesson:
        prompt = prompt_ids(tokenizer, row["prompt"])
        return lesson_of(tokenizer, prompt, row["steps"], row["answer"][0], config.answer_start)

    if held_out_rows and config.eval_strategy == "no":
        config.eval_strategy = "steps"
    lora = (
        LoraConfig(r=about.lora_rank, lora_alpha=2 * about.lora_rank, target_modules=LORA_TARGETS)
        if about.lora_rank
        else None
    )
    trainer = HRPOSFTTrainer(
        model,
        config,
        [lesson(row) for row in rows],
        [lesson(row) for row in held_out_rows],
        processing_class=tokenizer,
        peft_config=lora,
        accuracies=(lambda trainer: accuracies(trainer, task, held_out_rows, about.eval_batch_size))
        if held_out_rows
        else None,
    )
    return trainer, task, held_out_rows


def verdicts_of(trainer: HRPOSFTTrainer, task: Task, rows: list[Any], batch_size: int, control: str) -> list[float]:
    """Which problems the trainer's model answers right, greedily, with the forced thoughts of its stage."""
    args = trainer.args
    decoding = Decoding(args.max_completion_length, args.residual is not None, batch_size=batch_size, control=control)
    decoding.thoughts = trainer.forced
    accelerator = trainer.accelerator
    own = rows[accelerator.process_index :: accelerator.num_processes]
    model, title = accelerator.unwrap_model(trainer.model), f"Answering, thoughts {control}"
    shown = title if accelerator.is_main_process else None
    texts = completions(model, trainer.tokenizer, [row["prompt"] for row in own], decoding, shown)
    graded = [grade(task, row, text, args.answer_start) for row, text in zip(own, texts, strict=True)]
    verdicts: list[float] = gather_object(graded)
    return verdicts


def accuracies(trainer: HRPOSFTTrainer, task: Task, rows: list[Any], batch_size: int) -> dict[str, float]:
    """Greedy accuracy, and that with the same forced tokens and nothing blended."""
    controls = {"accuracy": "live"} | ({"accuracy_off": "off"} if trainer.args.residual is not None else {})
    found = {}
    for name, control in controls.items():
        verdicts = verdicts_of(trainer, task, rows, batch_size, control)
        found[name] = sum(verdicts) / len(verdicts)
    return found


def trained(run: SFTRun) -> dict[str, Any]:
    """Do what `main` does, with a run that was parsed."""
    asked = run.record()
    with in_a_sentence(run.words, own_names()):
        trainer, task, held_out = make_trainer(run)
    template = asker(run, task, trainer.tokenizer)(QUESTION)
    write_record(run.config, asked, template)
    started = time.monotonic()
    parts = ("supervised", run.about.model_name, spelled(run.config.residual), task.name)
    record: dict[str, Any] = {"title": ", ".join(parts), "arguments": asked | run.record()}
    record["prompt"] = template
    train_and_save(trainer, run.config.resume_from_checkpoint, run.words)
    record |= {"stage": trainer.curriculum.stage, "last_stage": trainer.curriculum.last, "thoughts": trainer.forced}
    if held_out:
        verdicts = verdicts_of(trainer, task, held_out, run.about.eval_batch_size, "live")
        counts = {"right": int(sum(verdicts)), "total": len(verdicts)}
        record["after"] = counts | {"mean": sum(verdicts) / len(verdicts), "standard_error": standard_error(verdicts)}
    record |= {"seconds": round(time.monotonic() - started, 1), "log": trainer.state.log_history}
    if trainer.accelerator.is_main_process:
        finish(trainer, record, run)
        print(f"stage {record['stage']} of {record['last_stage']}: {record['thoughts']} forced thoughts")
    return record
