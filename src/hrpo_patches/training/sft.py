"""HRPOSFTTrainer: supervised latent training, from worked solutions to thoughts.

It is transformers' `Trainer` with batches of its own: a stage decides how many steps of a solution are replaced by
forced thoughts. Each forward first thinks the given tokens (without gradient) and then replays them, and the gradient
flows back through the thoughts as `bptt` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from hrpo_patches.device import placed
from hrpo_patches.thinking.backbone import causal_lm, thinking_backbone
from hrpo_patches.thinking.decoding import filler_id
from hrpo_patches.thinking.replay import distribution_head
from hrpo_patches.training.curriculum import Curriculum
from hrpo_patches.training.lessons import IGNORED, Classroom, Lesson, LessonBatch
from hrpo_patches.training.logprobs import forward_scores
from hrpo_patches.training.prepare import freeze_unused, thinking_policy, with_thinking_modules
from hrpo_patches.training.sft_config import HRPOSFTConfig
from hrpo_patches.training.shared import ThinkingTrainer
from hrpo_patches.training.start import fit_projection, places_of
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.inputs import Bptt, ThinkingInputs
from hrpo_thinking.marker import thinking_table

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model

FITTED = 1000  # lessons that a projection is fitted on


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


class HRPOSFTTrainer(ThinkingTrainer):
    """Supervised training of a model that thinks where it would write steps.

    Args:
        model: a causal language model, plain or with fresh thinking modules.
        args: of the run.
        train_dataset: lessons, each of which a row stands for.
        eval_dataset: lessons for the loss of an evaluation.
        processing_class: the tokenizer.
        peft_config: of the adapter that is trained; None trains all weights. Thinking modules join its
            `modules_to_save`.
        accuracies: called with the trainer in each evaluation; what it returns joins the metrics, "accuracy" among
            them for `args.patience`.
        kwargs: for `transformers.Trainer`.

    Attributes:
        left_over: the share of the embeddings that a projection fitted by least squares does not explain; None where
            none was fitted.

    Raises:
        InputError: the model cannot think, the last stage has too many steps, cannot be reached or does not fit into
            a completion.
    """

    method = "supervised latent training (steps replaced by thoughts)"
    _tag_names = ["sft", "hrpo"]  # noqa: RUF012 - TRL's own type

    def __init__(
        self,
        model: Model,
        args: HRPOSFTConfig,
        train_dataset: Sequence[Lesson],
        eval_dataset: Sequence[Lesson] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        accuracies: Callable[[HRPOSFTTrainer], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, HRPOSFTConfig):
            raise InputError(f"HRPOSFTTrainer needs args=HRPOSFTConfig(...), not {type(args).__name__}.")
        if isinstance(model, str) or processing_class is None:
            raise InputError("HRPOSFTTrainer needs a loaded model, and its tokenizer as processing_class.")
        require(train_dataset, "train_dataset must have at least one lesson.")
        self.lessons = {"train": list(train_dataset), "eval": list(eval_dataset or ())}
        self.tokenizer, self._accuracies = processing_class, accuracies
        peft_config = with_thinking_modules(model, peft_config, args) if args.residual is not None else peft_config
        model = placed(thinking_policy(model, args), args.device)
        self._classroom = self._classroom_of(model, args)
        last = self._last_stage(args)
        self.left_over = self._start(model, args)
        model = get_peft_model(model, peft_config) if peft_config is not None else model
        # To transformers a row is a number, so that its sampler, its shards and its resuming are of lessons.
        rows = {name: [{"lesson": i} for i in range(len(lessons))] for name, lessons in self.lessons.items()}
        super().__init__(
            model,
            args,
            data_collator=default_data_collator,
            train_dataset=rows["train"],
            eval_dataset=rows["eval"] or None,
            processing_class=processing_class,
            **kwargs,
        )
        require(
            args.n_gpu <= 1,
            f"one process sees {args.n_gpu} GPUs, for which transformers takes nn.DataParallel, which thoughts do not "
            f"pass; start with accelerate launch, or let CUDA_VISIBLE_DEVICES name one GPU.",
        )
        freeze_unused(self.model, args)
        self.curriculum = Curriculum(args, last, self._enter)
        batches = len(self.get_train_dataloader())
        self.curriculum.check_reachable(math.ceil(batches / args.gradient_accumulation_steps))
        self.add_callback(self.curriculum)
        self._enter(self.curriculum.stage)
        if args.residual is not None:
            self._check_model(processing_class, rollout=None)
        self._batch, self._at = 0, -1  # of this step, and the step
        self._losses: list[Tensor] = []
        self._seen: dict[str, list[float | Tensor]] = {}
        self._finish_construction()

    # --- before training -------------------------------------------------------------------------------------------

    def _classroom_of(self, model: Model, args: HRPOSFTConfig) -> Classroom:
        thinking, table = ThinkingConfig(filler=args.filler or ThinkingConfig.filler), None
        if args.residual is not None:
            thinking = ThinkingConfig.from_dict(thinking_backbone(model).config.thinking)
            table = thinking_table(self.tokenizer, thinking, model.config.vocab_size)
        filler, padding = filler_id(self.tokenizer, thinking), self.tokenizer.pad_token_id
        padding = padding if padding is not None else self.tokenizer.eos_token_id
        return Classroom(filler, args.thoughts_per_step, padding, table)

    def _last_stage(self, args: HRPOSFTConfig) -> int:
        most = max(len(lesson.steps) for lesson in self.lessons["train"])
        last = args.until if args.until is not None else most
        require(last <= most, f"until={last} cannot be reached: no solution has more than {most} steps.")
        forced, room = self._classroom.thoughts(last), args.max_completion_length
        longest = max(len(lesson.answer) for lesson in self.lessons["train"])
        require(
            forced + longest <= room,
            f"{forced} thoughts ({last} steps of {args.thoughts_per_step}) and an answer of {longest} tokens must fit "
            f"into max_completion_length={room}; set until, fewer thoughts_per_step or longer completions.",
        )
        for name, lessons in self.lessons.items():
            for i, lesson in enumerate(lessons):
                size = max(len(self._classroom.completion(lesson, stage)) for stage in range(last + 1))
                text = f"the solution of {name} lesson {i} takes {size} tokens"
                require(size <= room, f"{text}; it must fit into max_completion_length={room}.")
        return last

    def _start(self, model: Model, args: HRPOSFTConfig) -> float | None:
        """Start gates and projection, if they are fresh; what least squares leaves over."""
        if args.residual is None:
            return None
        backbone: Any = thinking_backbone(model)
        if backbone.thinking_residual_gate_i.is_fresh():
            with torch.no_grad():
                backbone.thinking_residual_gate_i.bias.fill_(args.gate)
        if not backbone.thinking_projection.is_fresh():
            require(
                args.projection_start != "lstsq" and args.gate == HRPOSFTConfig.gate,
                "projection_start='lstsq' and gate start fresh modules, and this model's are trained.",
            )
            return None
        if args.start != "lstsq":
            return None
        texts = places_of(self.lessons["train"][:FITTED], args.thoughts_per_step)
        return fit_projection(model, texts, bool(args.bf16))

    def _enter(self, stage: int) -> None:
        """Let the model know how many forced thoughts its completions begin with."""
        base, thoughts = self._base_model(), self._classroom.thoughts(stage)
        generation: Any = base.generation_config  # with the fields that the patches add
        if self.args.residual is not None:
            thinking_backbone(base).config.thinking["thoughts"] = thoughts
            generation.thinking = True
        generation.thoughts = thoughts or None
        generation.filler_token_id = self._classroom.filler

    @property
    def forced(self) -> int:
        """The forced thoughts of a completion at today's stage."""
        return self._classroom.thoughts(self.curriculum.stage)

    # --- loss ------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The mean cross-entropy, in nats per token, of what is written after the thoughts."""
        training = model.training
        lessons = self.lessons["train" if training else "eval"]
        stage = self._stage_of_batch() if training else self.curriculum.stage
        batch = self._classroom.batch([lessons[i] for i in inputs["lesson"].tolist()], stage)
        logps, labels = self._logps(model, batch), batch.labels.to(self.accelerator.device)
        loss = -_mean(logps, labels != IGNORED)  # of (B, K)
        if training:
            following = -_mean(logps.detach(), batch.following.to(logps.device))
            if stage == self.curriculum.stage:  # earlier stages say nothing of whether this one is learned
                self._losses.append(torch.maximum(loss.detach(), following))
                self._observe({"loss_following": following})
            self._observe({"thoughts": float(self._classroom.thoughts(stage))})
        return (loss, None) if return_outputs else loss

    def _stage_of_batch(self) -> int:
        # transformers does not say which of a step's batches this is: they are counted.
        step = self.state.global_step
        self._batch = self._batch + 1 if step == self._at else 0
        self._at = step
        return self.curriculum.draw(step, self._batch)

    def _logps(self, model: nn.Module, batch: LessonBatch) -> Tensor:
        """Log-probabilities (B, K) of the completions' tokens."""
        ids, seen = (tensor.to(self.accelerator.device) for tensor in (batch.input_ids, batch.attention_mask))
        inner = causal_lm(self.accelerator.unwrap_model(model))
        inputs = {"thinking_inputs": self._thinking(inner, batch)} if self.args.residual is not None else {}
        with self.accelerator.autocast():
            return forward_scores(model, inner, ids, seen, batch.width, 1.0, **inputs)[0]

    def _thinking(self, inner: PreTrainedModel, batch: LessonBatch) -> ThinkingInputs:
        mask = batch.thinking.to(self.accelerator.device)
        if not batch.thinking.any():  # the modules are part of every forward: DDP waits for their gradients
            table: Any = inner.get_input_embeddings().weight
            states = table.new_zeros((*mask.shape, inner.config.hidden_size))  # (B, K, d)
            return ThinkingInputs(states, mask, self.args.residual)
        depth = self.args.depth if torch.is_grad_enabled() else 0
        # No states: today's weights decode them first, so that the gradient is not of another model's thoughts.
        head = distribution_head(inner, self.args.residual, 1.0)
        observe = self._observe if depth else None
        rule = Bptt(depth, self.args.bptt_tolerance, self.args.bptt_terms, False, head, observe)
        return ThinkingInputs(None, mask, self.args.residual, rule)

    def _observe(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            self._seen.setdefault(name, []).append(value)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._losses:
            losses = self.accelerator.reduce(torch.stack(self._losses).float(), reduction="mean").tolist()
            self._losses = []
            if self.state.global_step + 1 < self.state.max_steps:  # a stage that begins is trained
                self.curriculum.add_losses(losses)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            loss: Any = self.compute_loss(model, inputs)
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        accuracies = self._accuracies(self) if self._accuracies is not None else {}
        output.metrics.update({f"{prefix}_{name}": value for name, value in accuracies.items()})
        output.metrics[f"{prefix}_stage"] = self.curriculum.stage
        return output

    # --- log, save -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: float(sum(values) / len(values)) for name, values in self._seen.items()}
            logs["stage"] = self.curriculum.stage
            if self.left_over is not None and not any("projection/left_over" in row for row in self.state.log_history):
                logs["projection/left_over"] = self.left_over
            self._seen.clear()
        super().log(logs, *args, **kwargs)

    @property
    def _fillers(self) -> list[int]:  # type: ignore[override]  # they follow from the stage
        return [self._classroom.filler] * self.forced
