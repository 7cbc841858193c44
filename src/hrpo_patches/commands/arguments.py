"""The flags of a training run, their defaults and what they refuse; knows nothing of how a run is done.

The first block has the names and the defaults of the published HRPO scripts (arXiv 2505.18454).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from hrpo_patches.commands.command_line import option, parsed
from hrpo_patches.models.backends import BACKENDS
from hrpo_patches.models.record import THINKING_FILE, check_same_pauses, check_same_thinking, read_thinking
from hrpo_patches.monitor.report import require_matplotlib
from hrpo_patches.tasks.problems import find_task
from hrpo_patches.tasks.prompts import examples_of
from hrpo_patches.training.config import HRPOConfig, check_reference, read_passes
from hrpo_patches.training.resume import last_checkpoint
from hrpo_thinking.config import VARIANT, ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import NAMES
from hrpo_thinking.parts import residual_of, spelled


@dataclass
class RunArguments:
    """Everything a training script takes, on the command line or in a YAML file given by --config."""

    model_name: str = option("Qwen/Qwen2.5-1.5B-Instruct", f"Hub id or folder of a {NAMES} model, or smollm2-135m.")
    lora_rank: int = option(32, "LoRA rank; alpha is twice as much.")
    lr: float = option(5e-6, "Learning rate of LoRA.")
    beta: float = option(0.005, "Weight of the KL divergence from the base model.")
    residual_r_min: float = option(0.99, "Lower end of the initial decay.")
    residual_r_max: float = option(0.999, "Upper end of the initial decay.")
    lr_residual_gate: float = option(1e-4, "Learning rate of the two gates.")
    lr_residual_Lambda: float = option(1e-3, "Learning rate of Lambda.")
    lr_thinking_projection: float = option(1e-4, "Learning rate of thinking_projection.")
    weight_decay: float = option(0.1, "Weight decay of AdamW; Lambda and biases do not decay.")
    warmup_ratio: float = option(0.1, "Share of the steps that the learning rates rise in.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule.")
    optimizer: str = option(
        "paged_adamw_8bit", "Optimizer; adamw_torch takes its place without bitsandbytes or a GPU."
    )
    max_grad_norm: float = option(0.1, "Gradients are clipped to this norm.")
    group_size: int = option(4, "Completions of one prompt that are compared with each other.")
    temperature: float = option(0.5, "Sampling temperature of the rollouts.")
    gradient_accumulation_steps: int = option(4, "Batches that make one optimizer step.")
    per_device_train_batch_size: int = option(8, "Completions in one batch.")
    max_prompt_length: int = option(1024, "Problems with a longer prompt (in tokens) are left out.")
    max_completion_length: int = option(1024, "Completions are cut at so many tokens.")
    seed: int = option(42, "Seed of everything random.")

    task: str = option(
        "gsm8k",
        "What is asked and how answers are graded: a task, reasoning_gym:NAME?option=value, or package.module:TASK.",
    )
    dataset: str | None = option(
        None, "Hub id, .jsonl file or folder with the problems; by default where the task has them."
    )
    corpus: str | None = option(None, "File or folder of documents for questions that come without.")
    format_reward: float = option(0.0, "Weight of a reward for the marker alone, beside the answer's of 1.")
    shots: int = option(0, "How many of the task's worked examples the prompt shows.")
    residual: str | None = option("projection", "What thoughts are blended with: projection, embedding or none.")
    projection_layers: int = option(1, "Linear layers of the projection: 1, or 2 with SiLU between.")
    projection_hidden: int | None = option(None, "Width between two layers; by default the hidden size.")
    projection_norm: bool = option(False, "A LayerNorm after the projection.")
    projection_dropout: float = option(0.0, "Dropout of the projected vector, in the loss only.")
    residual_scale: str = option("unit", "Norm of the residual: unit, or embedding for that of the mean embedding.")
    answer_start: str = option("####", "The text that ends the thinking and starts the answer.")
    replay_passes: str = option("1", "Passes of the loss's replay: 1, k for k - 1 thoughts back, or all, exact.")
    thoughts: int | None = option(None, "Forced thoughts before a completion; by default the --adapter's, or none.")
    filler: str | None = option(None, "The token that a forced thought is; by default the --adapter's, or '.'.")
    reference: str = option(
        "base", "What the KL divergence is from: base, or start, the model that training began from."
    )
    examples: list[str] = field(
        default_factory=list,
        metadata={"help": "Worked examples for the prompt, each a question, a solution and its answer."},
    )
    backend: str = option("auto", "transformers, unsloth, or auto: unsloth if it is installed and a GPU is there.")
    prompt: str = option("auto", "chat, plain, or auto: chat if the tokenizer has a chat template.")
    output_dir: str = option("runs/hrpo", "Where the run is written; must not hold one yet.")
    max_steps: int = option(-1, "Optimizer steps; -1 goes through the data once.")
    save_steps: int = option(250, "Steps between checkpoints; the last 3 are kept.")
    logging_steps: int = option(1, "Steps between log lines.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or 'latest' for the last one in output_dir."
    )
    adapter: str | None = option(None, "Go on from this adapter instead of a fresh one.")
    init_projection: bool = option(False, "Start a projection for an --adapter that was trained without one.")
    report_to: str = option("none", "none, tensorboard, wandb or trackio.")
    report: bool = option(False, "Write report.png beside report.json at the end.")
    eval_problems: int = option(0, "Held-out problems to answer greedily before and after training.")
    eval_batch_size: int = option(50, "Held-out problems answered at once.")

    def thinking(self) -> ThinkingConfig | None:
        """How the model is to think; None for plain GRPO."""
        variant = {name: getattr(self, name) for name in VARIANT}
        forced = {name: value for name in ("thoughts", "filler") if (value := getattr(self, name)) is not None}
        if self.adapter is not None and (Path(self.adapter) / THINKING_FILE).is_file():
            own = read_thinking(Path(self.adapter))
            forced = {name: own[name] for name in ("thoughts", "filler") if name in own} | forced
        limits = {"r_min": self.residual_r_min, "r_max": self.residual_r_max, "answer_start": self.answer_start}
        if self.residual is None:
            if used := [name for name, value in variant.items() if value != getattr(ThinkingConfig, name)]:
                raise InputError(f"--{used[0]} is about the projection; it does not go with --residual none.")
            ThinkingConfig.from_dict(limits | forced)
            return None
        return ThinkingConfig.from_dict({"residual": self.residual} | limits | forced | variant)

    def check(self) -> None:
        """Raise `InputError` for whatever can be known to be wrong before any work."""
        try:
            self.residual = residual_of(self.residual)
        except InputError as error:
            raise InputError(f"--{error}") from None
        thinking = self.thinking()
        read_passes(self.replay_passes)
        check_reference(self.reference)
        forced = thinking.thoughts if thinking is not None else self.thoughts or 0
        if forced and forced >= self.max_completion_length:
            raise InputError(
                f"--thoughts {forced} leave no room in --max_completion_length {self.max_completion_length}."
            )
        if self.backend not in BACKENDS:
            raise InputError(f"--backend has to be auto, transformers or unsloth, not {self.backend!r}.")
        if self.prompt not in ("auto", "chat", "plain"):
            raise InputError(f"--prompt has to be auto, chat or plain, not {self.prompt!r}.")
        examples_of(find_task(self.task, self.dataset, size=1), self.answer_start, self.shots, self.examples)
        if self.format_reward < 0:
            raise InputError(f"--format_reward has to be 0 or more, not {self.format_reward}.")
        for name in ("lora_rank", "temperature", "max_prompt_length", "max_completion_length", "eval_batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} has to be above 0, not {getattr(self, name)}.")
        if self.eval_problems < 0:
            raise InputError(f"--eval_problems has to be 0 or more, not {self.eval_problems}.")
        if self.report_to not in ("none", "tensorboard", "wandb", "trackio"):
            raise InputError(f"--report_to has to be none, tensorboard, wandb or trackio, not {self.report_to!r}.")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise InputError(f"--report_to {self.report_to} is not installed; run: pip install {self.report_to}")
        if self.init_projection and self.adapter is None:
            raise InputError("--init_projection goes with --adapter; a fresh adapter has a projection anyway.")
        if self.report:
            require_matplotlib("--report")
        self._check_output()

    def _check_output(self) -> None:
        folder = Path(self.output_dir)
        if folder.is_file():
            raise InputError(f"--output_dir {folder} is a file.")
        holds = folder.is_dir() and any(folder.iterdir())
        if holds and self.resume_from_checkpoint is None:
            raise InputError(
                f"{folder} already holds a run; give another --output_dir, or go on with it by "
                f"--resume_from_checkpoint latest."
            )
        if self.resume_from_checkpoint is not None:
            self._check_resume(folder, holds)

    def _check_resume(self, folder: Path, holds: bool) -> None:
        if self.resume_from_checkpoint == "latest":
            last = last_checkpoint(folder) if holds else None
            if last is None:
                raise InputError(f"{folder} holds no checkpoint to resume from.")
            self.resume_from_checkpoint = str(last)
        checkpoint = Path(self.resume_from_checkpoint or "")
        if not (checkpoint / "trainer_state.json").is_file():
            raise InputError(f"{checkpoint} is no checkpoint: trainer_state.json does not exist there.")
        if holds and checkpoint.resolve().parent != folder.resolve():
            raise InputError(f"{folder} already holds another run than the checkpoint {checkpoint}.")
        check_same_thinking(checkpoint, spelled(self.residual), self.thinking())
        if self.residual is None:
            check_same_pauses(checkpoint, self.thoughts or 0)

    def trainer_config(self) -> HRPOConfig:
        """The trainer's arguments."""
        cuda = torch.cuda.is_available()
        return HRPOConfig(
            output_dir=self.output_dir,
            residual=self.residual,
            answer_start=self.answer_start,
            replay_passes=self.replay_passes,
            thoughts=self.thoughts,
            filler=self.filler,
            reference=self.reference,
            lr_residual_gate=self.lr_residual_gate,
            lr_residual_Lambda=self.lr_residual_Lambda,
            lr_thinking_projection=self.lr_thinking_projection,
            learning_rate=self.lr,
            beta=self.beta,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_ratio,  # below 1 it is a ratio
            lr_scheduler_type=self.lr_scheduler_type,
            optim=self.usable_optimizer(),
            max_grad_norm=self.max_grad_norm,
            num_generations=self.group_size,
            temperature=self.temperature,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            per_device_train_batch_size=self.per_device_train_batch_size,
            max_completion_length=self.max_completion_length,
            seed=self.seed,
            reward_weights=[1.0, self.format_reward] if self.format_reward else None,
            max_steps=self.max_steps,
            num_train_epochs=1,
            save_steps=self.save_steps,
            save_total_limit=3,
            logging_steps=self.logging_steps,
            report_to=self.report_to,
            loss_type="grpo",  # the loss of the published runs: a mean over each completion's tokens
            bf16=cuda and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=cuda and self.backend != "unsloth",  # unsloth's models do their own
            dataloader_pin_memory=cuda,
        )

    def usable_optimizer(self) -> str:
        """The optimizer, or adamw_torch where bitsandbytes' cannot run, which is said in one line."""
        if "8bit" in self.optimizer and not (torch.cuda.is_available() and find_spec("bitsandbytes") is not None):
            print(f"{self.optimizer} needs bitsandbytes and a GPU; using adamw_torch.")
            return "adamw_torch"
        return self.optimizer


def parse(argv: list[str] | None, task: str = "gsm8k") -> RunArguments:
    """The arguments of a command line (by default this process's), checked; `task` is the one where --task names none.

    Raises:
        InputError: the config file is missing or has an unknown key, or an argument cannot work.
    """
    return parsed(RunArguments, argv, task=task)
