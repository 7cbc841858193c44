"""The flags of a training run, their defaults and what they refuse."""

from __future__ import annotations

from argparse import SUPPRESS
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
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
)
from hrpo_patches.commands.refusals import in_a_sentence
from hrpo_patches.commands.resume import check_output
from hrpo_patches.device import has_bf16
from hrpo_patches.engines.choice import CHOICES, ENGINE_HELP
from hrpo_patches.extras import require_package
from hrpo_patches.models.adapter import config_of
from hrpo_patches.models.backends import BACKENDS
from hrpo_patches.models.hub import adapter_folder
from hrpo_patches.models.record import check_same_pauses, check_same_thinking, read_thinking
from hrpo_patches.tasks.problems import find_task
from hrpo_patches.tasks.prompts import PROMPTS, examples_of
from hrpo_patches.training.config import SHARED, GRPOConfig, HRPOConfig, ThinkingArguments
from hrpo_patches.training.shared import check_push
from hrpo_patches.training.start import STARTS, check_fits
from hrpo_thinking.config import OPTIONS, ThinkingConfig
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.families import NAMES
from hrpo_thinking.parts import spelled
from hrpo_thinking.request import check_room

OF_TRL = set(GRPOConfig.__dataclass_fields__) - {"resume_from_checkpoint", "report_to"}  # whose flags differ
REST = [name for name in OPTIONS if name not in SHARED]  # options of thinking that HRPOConfig has no field for
DTYPES = ("float32", "bfloat16", "float16")
_ALL = "--help_all"
_GPU = torch.cuda.is_available()


@dataclass
class ProblemArguments:
    """The model of a run, its problems, and how they are put to it."""

    _argument_group_name = "the run"

    model_name: str = option("Qwen/Qwen2.5-1.5B-Instruct", f"Hub id or folder of a {NAMES} model, or smollm2-135m.")
    task: str = option(
        "gsm8k",
        "What is asked and how answers are graded: a task, passing?moves=4-8, reasoning_gym:NAME?option=value, or "
        "package.module:TASK.",
    )
    dataset: str | None = option(
        None, "Hub id, .jsonl file or folder with the problems; by default where the task has them."
    )
    prompt: str = option("auto", "chat, plain, or auto: chat if the tokenizer has a chat template.", choices=PROMPTS)
    shots: int = option(0, "How many of the task's worked examples the prompt shows.")
    examples: list[str] = field(
        default_factory=list,
        metadata={"help": "Worked examples for the prompt, each a question, a solution and its answer."},
    )
    max_prompt_length: int = option(1024, "Problems with a longer prompt (in tokens) are skipped.")
    lora_rank: int = option(32, "LoRA rank; alpha is twice as much.")
    eval_problems: int = option(0, "Held-out problems to answer greedily before and after training.")
    eval_batch_size: int = option(50, "Held-out problems answered at once.")
    report: bool = option(False, "Write report.png beside report.json at the end.")


@dataclass
class RunArguments(ProblemArguments):
    """What a training run is about, beside its training arguments."""

    corpus: str | None = option(None, "File or folder of documents for questions that come without.")
    format_reward: float = option(0.0, "Weight of a reward for the marker alone, beside the answer's of 1.")
    engine: str = option("generate", ENGINE_HELP, choices=CHOICES)
    adapter: str | None = option(None, "Train this adapter (a folder or a hub id) further instead of a fresh one.")
    projection_start: str = option(
        "random",
        "Where a fresh projection starts: random; or lstsq, least squares from states to the embeddings of the tokens "
        "that follow them, in completions of the base.",
        choices=STARTS,
    )
    init_projection: bool = option(False, "Start a projection for an --adapter that was trained without one.")


@dataclass
class TrainingFlags(HRPOConfig):
    """`HRPOConfig` with the names and the defaults of the published HRPO scripts (arXiv 2505.18454)."""

    _argument_group_name = "training: TRL's arguments, and how thinking is trained"

    thinking: None = option(None, SUPPRESS)  # each option is a flag of its own
    output_dir: str | None = published(HRPOConfig, "output_dir", "runs/hrpo")
    learning_rate: float = published(HRPOConfig, "learning_rate", 5e-6, "--lr")
    beta: float = published(HRPOConfig, "beta", 0.005)
    weight_decay: float = published(HRPOConfig, "weight_decay", 0.1)
    warmup_steps: float = published(HRPOConfig, "warmup_steps", 0.1, "--warmup_ratio")  # below 1 it is a ratio
    lr_scheduler_type: str = published(HRPOConfig, "lr_scheduler_type", "cosine")
    optim: str = published(HRPOConfig, "optim", "paged_adamw_8bit", "--optimizer")
    max_grad_norm: float = published(HRPOConfig, "max_grad_norm", 0.1)
    num_generations: int | None = published(HRPOConfig, "num_generations", 4, "--group_size")
    temperature: float = published(HRPOConfig, "temperature", 0.5)
    gradient_accumulation_steps: int = published(HRPOConfig, "gradient_accumulation_steps", 4)
    per_device_train_batch_size: int = published(HRPOConfig, "per_device_train_batch_size", 8)
    max_completion_length: int | None = published(HRPOConfig, "max_completion_length", 1024)
    seed: int = published(HRPOConfig, "seed", 42)
    max_steps: int = published(HRPOConfig, "max_steps", -1)
    num_train_epochs: float = published(HRPOConfig, "num_train_epochs", 1)
    loss_type: str = published(HRPOConfig, "loss_type", "grpo")  # a mean over each completion's tokens
    save_steps: float = published(HRPOConfig, "save_steps", 250)
    save_total_limit: int | None = published(HRPOConfig, "save_total_limit", 3)
    logging_steps: float = published(HRPOConfig, "logging_steps", 1)
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' for the last in output_dir.")
    report_to: list[str] = field(default_factory=lambda: ["none"], metadata=TRACKERS)
    bf16: bool = published(HRPOConfig, "bf16", has_bf16())
    gradient_checkpointing: bool = published(HRPOConfig, "gradient_checkpointing", _GPU)
    dataloader_pin_memory: bool = published(HRPOConfig, "dataloader_pin_memory", _GPU)

    def __post_init__(self) -> None:
        of_bitsandbytes = "8bit" in self.optim and "torch" not in self.optim  # adamw_torch_8bit is torchao's
        if of_bitsandbytes and not (_GPU and find_spec("bitsandbytes") is not None):
            print(f"{self.optim} needs bitsandbytes and a GPU; using adamw_torch.")
            self.optim = "adamw_torch"
        super().__post_init__()


@dataclass
class Run:
    """All that a command line says.

    Attributes:
        about: what the run is about.
        config: of the trainer.
        rest: the options of thinking that the trainer's config has no field for.
        backend: as it was asked for.
        words: of the command line.
        question: that of the first problem, once the problems are read.
    """

    about: RunArguments
    config: TrainingFlags
    rest: dict[str, Any]
    backend: str = "auto"
    words: Written = field(default_factory=list)
    question: str = ""

    def thinking(self) -> ThinkingConfig | None:
        """How the model is to think; None for plain GRPO."""
        own = {name: value for name in SHARED if (value := getattr(self.config, name)) is not None}
        if self.about.adapter is not None:
            saved = read_thinking(Path(self.about.adapter)) or {}
            own = {name: saved[name] for name in ("thoughts", "filler") if name in saved} | own
        if self.config.residual is None:
            changed = [name for name, value in self.rest.items() if value != getattr(ThinkingConfig, name)]
            if used := [name for name in changed if OPTIONS[name].part is not None]:
                raise InputError(f"--{used[0]} is about the projection; it cannot be combined with --residual none.")
        thinking = ThinkingConfig.from_dict(self.rest | own)
        return thinking if self.config.residual is not None else None

    def record(self) -> dict[str, Any]:
        """What the run was asked for, by flag: all but those of TRL's arguments that are as TRL has them."""
        flags, ours = self.config.to_dict(), set(own_flags())
        fields = HRPOConfig.__dataclass_fields__
        own = {n: value for n, value in flags.items() if n in ours or (n in fields and value != fields[n].default)}
        own |= {"residual": spelled(self.config.residual), "backend": self.backend}
        return asdict(self.about) | self.rest | own

    def check(self) -> None:
        """Raise `InputError` for whatever can be known to be wrong before any work."""
        about, config = self.about, self.config
        thinking = self.thinking()
        forced = thinking.thoughts if thinking is not None else config.thoughts or 0
        check_room(forced, config.max_completion_length or 0, "--thoughts", "--max_completion_length")
        require(
            config.engine == "generate" or about.engine in ("generate", "auto", config.engine),
            f"--engine {about.engine} and TRL's own flags ask for two engines; remove one of them.",
        )
        examples_of(find_task(about.task, about.dataset, size=1), config.answer_start, about.shots, about.examples)
        require(about.format_reward >= 0, f"--format_reward must be 0 or more, not {about.format_reward}.")
        numbers = asdict(about) | {name: getattr(config, name) for name in ("temperature", "max_completion_length")}
        for name in ("lora_rank", "temperature", "max_prompt_length", "max_completion_length", "eval_batch_size"):
            if numbers[name] is not None and not numbers[name] > 0:
                raise InputError(f"--{name} must be above 0, not {numbers[name]}.")
        require(
            not about.format_reward or config.reward_weights is None,
            "--format_reward and --reward_weights both give weights of rewards; remove one of them.",
        )
        require(
            config.reward_weights is None or len(config.reward_weights) == 1,
            f"--reward_weights needs one weight, the answer's, not {config.reward_weights}; --format_reward is the "
            f"weight of the marker.",
        )
        if about.adapter is not None and about.lora_rank != RunArguments.lora_rank:
            rank = config_of(Path(about.adapter)).r
            require(
                about.lora_rank == rank,
                f"--lora_rank {about.lora_rank} cannot change --adapter, which has rank {rank}.",
            )
        require(
            not config.remove_unused_columns,
            "--remove_unused_columns takes the gold answers from the reward; remove it.",
        )
        require(
            not config.trust_remote_code,
            "--trust_remote_code: hrpo train runs no code of a model's repository; load the model in Python, and "
            "hand it to HRPOTrainer.",
        )
        init: Any = config.model_init_kwargs or {}
        require(
            "thinking" not in init and init.get("dtype", "float32") in DTYPES,
            f"--model_init_kwargs {init}: expected options of from_pretrained, dtype one of {', '.join(DTYPES)}; "
            f"how the model thinks has flags of its own.",
        )
        require(
            about.adapter is None or config.residual is not None,
            "--adapter continues a thinking adapter; it cannot be combined with --residual none.",
        )
        if about.projection_start == "lstsq":
            check_fits(config.residual, self.rest["projection_layers"], self.rest["projection_norm"])
            require(self.backend != "unsloth", "--projection_start lstsq requires --backend transformers.")
            require(
                about.adapter is None,
                "--projection_start lstsq starts a fresh projection; it cannot be combined with --adapter.",
            )
        require(
            not about.init_projection or about.adapter is not None,
            "--init_projection requires --adapter; a fresh adapter has a projection anyway.",
        )
        check_run(config, about, about.model_name)
        self._check_output()

    def _check_output(self) -> None:
        checkpoint = check_output(self.config, self.record())
        if checkpoint is None:
            return
        self.config.resume_from_checkpoint = str(checkpoint)
        check_same_thinking(checkpoint, spelled(self.config.residual), self.thinking())
        if self.config.residual is None:
            check_same_pauses(checkpoint, self.config.thoughts or 0)


def check_run(config: TrainingArguments, about: ProblemArguments, base: str | None) -> None:
    """Raise `InputError` for what no run can do; `base` is the base model of its adapter, None without one."""
    require(about.eval_problems >= 0, f"--eval_problems must be 0 or more, not {about.eval_problems}.")
    require(
        about.eval_problems or (config.eval_strategy == "no" and not config.eval_on_start),
        "--eval_strategy and --eval_on_start require --eval_problems.",
    )
    require(
        not config.enable_jit_checkpoint,
        "--enable_jit_checkpoint: a run saves a checkpoint upon SIGTERM by itself; remove it.",
    )
    trackers: Any = config.report_to  # a list: transformers has removed a single none
    require("none" not in trackers, "--report_to none cannot be combined with other names.")
    for tracker in trackers:
        require_package(tracker, f"--report_to {tracker}")
    if about.report:
        require_package("matplotlib", "--report")
    if config.push_to_hub:
        check_push(config, base)
    elif config.hub_model_id is not None:
        raise InputError("--hub_model_id requires --push_to_hub true.")


def make_parser(prog: str, whole: bool = False) -> TrlParser:
    """The parser of a training run's flags; its help leaves TRL's own out, unless it is to be `whole`."""
    text = "Train a model to think, by GRPO. Any option can stand in the YAML file of --config."
    parser = parser_of(RunArguments, TrainingFlags, prog=prog, description=text)
    add_first_flags(parser, backend=True)
    add_thinking_flags(parser, REST)
    parser.add_argument(_ALL, action="help", help="Show TRL's own options, too, all of which are flags.")
    own = {*own_flags(), "help", "help_all"}
    for action in parser._actions:
        if not whole and action.dest not in own:
            action.help = SUPPRESS
    return parser


def own_flags() -> list[str]:
    """The names of all flags but those of TRL's that are as TRL has them."""
    kinds = (ThinkingArguments, HRPOConfig, ProblemArguments, RunArguments, TrainingFlags)
    names = {name for kind in kinds for name in kind.__annotations__ if not name.startswith("_")}
    return sorted((names | {*REST, "backend", "config"}) - {"thinking"})


def own_names() -> set[str]:
    """`own_flags`, and the other names that they have in the published scripts."""
    aliases = (name for one in fields(TrainingFlags) for name in one.metadata.get("aliases", ()))
    return {*own_flags(), *(name.removeprefix("--") for name in aliases)}


def parse(words: Written, task: str = "gsm8k", backend: str = BACKENDS[0], prog: str = "hrpo train") -> Run:
    """The run that a command line without --backend and --config asks for, checked; `task` is where it names none.

    Raises:
        InputError: a flag is not known, or something that it asks for cannot work.
    """
    with in_a_sentence(words, own_names()):
        about, config, more = read(make_parser(prog, whole=_ALL in words), words, task=task)
    if about.adapter is not None:
        about.adapter = str(adapter_folder(about.adapter))
    run = Run(about, config, {name: getattr(more, name) for name in REST}, backend, words)
    run.check()
    return run
