"""HRPOTrainer: GRPOTrainer whose rollouts think and whose loss replays them.

It overrides only what differs from TRL: the constructor (which modules are trained, and that they stay float32), the
generation of one turn (keeps the states), the generation (adds forced thoughts to the prompt), the scoring of a batch
(adds the states), the loss and its log-probabilities (replay them), the optimizer (its groups), the order of the data
and the save (two more files).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation
from trl.trainer import utils as trl_utils
from trl.trainer.utils import pad

from hrpo_patches.engines.base import NOT_FINITE, Completions, Engine
from hrpo_patches.engines.continuous import ContinuousEngine
from hrpo_patches.engines.generate import GenerateEngine
from hrpo_patches.models.backends import backend_of
from hrpo_patches.monitor.nonfinite import keep
from hrpo_patches.thinking.backbone import causal_lm, temporarily, thinking_backbone
from hrpo_patches.thinking.decoding import filler_id
from hrpo_patches.thinking.replay import distribution_head
from hrpo_patches.thinking.shards import whole
from hrpo_patches.training.config import HRPOConfig
from hrpo_patches.training.data_order import DataOrder
from hrpo_patches.training.distributed import as_long_as_any
from hrpo_patches.training.logprobs import forward_scores
from hrpo_patches.training.prepare import (
    float32_copies,
    freeze_unused,
    policy,
    restore_float32,
    with_thinking_modules,
)
from hrpo_patches.training.reference import StartReference
from hrpo_patches.training.rewards import RewardFuncs, checked_rewards
from hrpo_patches.training.shared import ThinkingTrainer
from hrpo_patches.training.trl_classes import trl_class
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError, NonFiniteError, require
from hrpo_thinking.inputs import Bptt, Depth, ThinkingInputs
from hrpo_thinking.request import check_room

if TYPE_CHECKING:
    from hrpo_patches.thinking.backbone import Model

GRPOTrainer: Any = trl_class("trl.trainer.grpo_trainer", "GRPOTrainer")
POSITIONAL = [*signature(GRPOTrainer.__init__).parameters][4:]  # after self, model, reward_funcs and args
TURNS = ("tools", "rollout_func", "environment_factory")  # TRL's own generation, of several turns


@contextmanager
def trl_constructor(args: HRPOConfig, named: bool) -> Iterator[None]:
    """Within, TRL's constructor finds four things changed; afterwards they are as they were.

    - `args.model_init_kwargs` lack `thinking`: TRL also loads reward models and the reference with them, and those do
      not think.
    - `args.beta` is 0 with `reference="start"`: otherwise TRL loads a second model for its own reference. It copies
      beta, so the trainer must set `self.beta` afterwards.
    - The warning that `model_init_kwargs` are ignored is silent where the policy is `named`: `policy` loaded it, and
      has used them.
    - The class of vLLM's engine is `ThinkingVLLM`: the constructor starts the engine, and takes no class for it.
    """
    init: Any = args.model_init_kwargs or {}  # TRL has read it
    others = {name: value for name, value in init.items() if name != "thinking"}
    trl_logger = logging.getLogger(GRPOTrainer.__module__)

    def is_true(record: logging.LogRecord) -> bool:
        return not named or "your model is already instantiated" not in record.getMessage()

    with ExitStack() as stack:
        stack.enter_context(
            temporarily(args, model_init_kwargs=others or None, beta=0.0 if args.from_start else args.beta)
        )
        trl_logger.addFilter(is_true)
        stack.callback(trl_logger.removeFilter, is_true)
        if args.use_vllm and args.vllm_mode == "colocate":
            from hrpo_patches.engines.vllm import engines_that_think  # imports vLLM

            stack.enter_context(engines_that_think(sys.modules[GRPOTrainer.__module__]))
        yield


class HRPOTrainer(ThinkingTrainer, GRPOTrainer):
    """GRPO with hybrid latent reasoning (arXiv 2505.18454); `args.residual=None` trains plain GRPO.

    Takes what `trl.GRPOTrainer` takes. With `peft_config`, the thinking modules are added to `modules_to_save`.
    A plain model gains the thinking modules. `args.residual` and `args.answer_start` are written to
    `model.config.thinking`.

    Raises:
        InputError: before the first step, if the model cannot think or cannot hand over its last hidden state, the
            tokenizer cannot spell the marker, or an option cannot be combined with thinking.
    """

    _tag_names = ["trl", "grpo", "hrpo"]  # noqa: RUF012 - TRL's own type
    _name, method = "HRPO", "GRPO with thinking rollouts"
    generation_config: Any  # TRL's `GenerationConfig`, with the fields that the patches add
    # What log-probabilities replay: a rollout's thoughts while TRL scores it, and a batch's in the loss.
    _thinking: ThinkingInputs | None = None
    _rolled_out = 0  # the step whose weights made the rollout

    def __init__(
        self,
        model: str | Model,
        reward_funcs: RewardFuncs = None,
        args: HRPOConfig | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else HRPOConfig(output_dir="HRPO")
        require(isinstance(args, HRPOConfig), f"HRPOTrainer needs args=HRPOConfig(...), not {type(args).__name__}.")
        args.check_generation_kwargs()
        kwargs |= dict(zip(POSITIONAL, positional, strict=False))
        turns = [name for name in TURNS if kwargs.get(name)]
        if args.residual is not None:
            text = f"{', '.join(turns)} generates outside of one thinking turn; remove it, or set residual=None."
            require(not turns, text)
            kwargs["peft_config"] = with_thinking_modules(model, kwargs.get("peft_config"), args)
        # Before TRL sees the model: the thinking weights are drawn from the run's seed, and in float32.
        loaded = policy(model, args, kwargs.get("quantization_config"))
        drawn = float32_copies(loaded) if args.residual is not None else {}
        with trl_constructor(args, named=isinstance(model, str)):
            super().__init__(loaded, checked_rewards(reward_funcs), args, **kwargs)
        freeze_unused(self.model, args)  # after PEFT, which makes all of `modules_to_save` trainable
        if args.residual is not None:
            restore_float32(self.model, drawn)  # TRL casts all trainable weights of a quantized model
            self._make_thinking()
        self._force_thoughts(bool(turns))
        self._add_callbacks(args)
        self._finish_construction()

    def _make_thinking(self) -> None:
        """Check what TRL constructed, and let its rollouts think."""
        if is_peft_model(self.model) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")  # TRL's copy of the adapter; our references need none
        self.generation_config = getattr(self, "generation_config", None) or GenerationConfig()  # TRL's vLLM has none
        self._check_model(self._tokenizer, self.generation_config)
        self.generation_config.update(thinking=True, return_dict_in_generate=True)

    def _add_callbacks(self, args: HRPOConfig) -> None:
        """Add the data's order, and the reference that keeps the weights of now."""
        self._data_order = DataOrder()
        self.add_callback(self._data_order)
        if args.from_start:
            self.beta = args.beta  # TRL was told 0
            self.ref_model = StartReference(self.accelerator.unwrap_model(self.model))
            self.add_callback(self.ref_model)

    def _force_thoughts(self, several_turns: bool) -> None:
        """Let every completion begin with the run's forced thoughts, also where nothing is blended."""
        args, base = self.args, self._base_model()
        saved: Any = base.generation_config  # with the fields that the patches add
        thinking, filler = ThinkingConfig.of(base.config) or ThinkingConfig(), None
        if args.residual is None:  # pauses: as the run says, or else as the model was saved
            thoughts = args.thoughts if args.thoughts is not None else saved.thoughts or 0
            filler = saved.filler_token_id if args.filler is None else None
            thinking = ThinkingConfig(thoughts=thoughts, filler=args.filler or thinking.filler)
        text = "span='thoughts' lets forced thoughts alone think; it requires thoughts of at least 1."
        require(args.residual is None or thinking.span != "thoughts" or thinking.thoughts, text)
        args.thoughts, args.filler = thinking.thoughts, thinking.filler  # a checkpoint's arguments say what was done
        self._fillers = []
        saved.thoughts = thinking.thoughts or None
        if not thinking.thoughts:
            return
        text = "forced thoughts begin a completion of one turn; remove tools, or set thoughts=0."
        require(not several_turns, text)
        check_room(thinking.thoughts, args.max_completion_length, tokens="max_completion_length")
        filler = filler if filler is not None else filler_id(self._tokenizer, thinking)
        self._fillers = [filler] * thinking.thoughts
        for config in (self.generation_config, saved):
            config.thoughts, config.filler_token_id = thinking.thoughts, filler
        if args.use_vllm:
            self.vllm_generation.forced = thinking.thoughts

    # --- rollout ---------------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, list | None]:
        if self.args.residual is None:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            completion_ids = [ids[len(self._fillers) :] for ids in completion_ids]  # `_generate` adds them again
        else:
            completion_ids, logprobs = self._think(prompt_ids, *args, **kwargs)
        texts = self._tokenizer.batch_decode(completion_ids)
        # In the text, as the reward reads it: several sequences of tokens may spell the marker.
        marked = torch.tensor([self.args.answer_start in text for text in texts], device=self.accelerator.device)
        self._record("marker_rate", self.accelerator.gather(marked).float().mean())
        return completion_ids, logprobs

    def _think(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, list | None]:
        """Sample a thinking completion for each prompt; returns token ids and log-probabilities."""
        completions = self._complete(prompt_ids, *args, **kwargs)
        thinking = completions.thinking
        if thinking is None or completions.ratio is None:
            raise InputError("the engine returned no thinking states: its completions need `thinking` and `ratio`.")
        require(
            thinking.residual == self.args.residual,
            f"the rollout used the {thinking.residual} residual instead of {self.args.residual}: the model's forward "
            f"returns no last_hidden_state.",
        )
        self._thinking = thinking
        if self.model.training:  # an evaluation may stand between a generation and its use
            self._rolled_out = self.state.global_step
        self._record_ratios(completions.shares())
        self._record_length(thinking, completions.tokens)
        return completions.tokens, completions.logprobs

    def engine(self, model: Model) -> Engine:
        """What makes this run's thinking rollouts with `model`, unless vLLM does, which TRL starts."""
        if self.args.use_transformers_continuous_batching:
            return ContinuousEngine(model, self._tokenizer, self.continuous_batching_config)
        return GenerateEngine(model, self._tokenizer)

    def _complete(self, prompt_ids: list, *args: Any, **kwargs: Any) -> Completions:
        try:
            if self.args.use_vllm:
                # TRL's own method sends the weights to the engine first.
                tokens, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
                completions: Completions = self.vllm_generation.completions(tokens, logprobs)
                return completions
            with (
                unwrap_model_for_generation(
                    self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
                ) as model,
                torch.no_grad(),
                whole(self.model),
            ):
                engine = self.engine(model)
                engine.refresh_weights()
                return engine.complete(prompt_ids, self.generation_config)
        except RuntimeError as error:
            if NOT_FINITE not in str(error):
                raise
        # Outside of the handler: what failed in torch is not the cause that a reader needs.
        folder, step = Path(self.args.output_dir), self.state.global_step + 1
        prompts = {"input_ids": pad([torch.tensor(ids) for ids in prompt_ids], self._tokenizer.pad_token_id, "left")}
        file = keep(self.model, prompts, folder, step, self.args.process_index)
        raise NonFiniteError(
            f"the logits of step {step}'s rollout are not finite, so nothing could be sampled; its prompts are in "
            f"{file}. Lower the learning rates, and resume from the last checkpoint."
        )

    def _generate(self, prompts: list) -> tuple:
        # To TRL a forced thought is the end of the prompt: no loss, no KL, no length and no text of the completion.
        prompt_ids, *rest = super()._generate(prompts)
        return [ids + self._fillers for ids in prompt_ids], *rest

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._thinking is not None:  # as tensors by name, which TRL shuffles and splits by rows
            # States (B, F + C, d), mask (B, F + C): F forced thoughts, to TRL a part of the prompt, and C tokens.
            thinking = self._thinking.aligned(len(self._fillers) + output["completion_ids"].shape[1])
            output |= {"thinking_states": thinking.states, "thinking_mask": thinking.mask}
            self._thinking = None
        return output

    # --- loss ------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.args.residual is None:
            return super()._compute_loss(model, inputs)
        # Within, every log-probability that TRL asks for is that of a model that thinks as in this rollout.
        thinking = ThinkingInputs(inputs["thinking_states"], inputs["thinking_mask"], self.args.residual)
        with temporarily(self, _thinking=thinking):
            return super()._compute_loss(model, inputs)

    def _is_reference(self, model: nn.Module) -> bool:
        """Whether this forward is that of a reference that does not think: another model, or ours without adapters."""
        if model is self.ref_model:
            return True
        return bool(getattr(thinking_backbone(self._base_model()).thinking_residual_Lambda, "disable_adapters", False))

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, with the rollout replayed; in plain torch where TRL's fused LM head cannot run."""
        if self.args.residual is None and self._trl_scores():
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
        unsupported = [name for name, value in others.items() if value is not None and value is not False]
        text = f"HRPOTrainer trains dense text models, without images or router losses; got {', '.join(unsupported)}."
        require(not unsupported, text)
        if isinstance(model, StartReference):
            with model.in_place():
                start = self._bptt(0, stale=True)  # the states are decoded again: these weights did not make them
                return self._scored(self.model, input_ids, attention_mask, logits_to_keep, batch_size, start)
        rule: Bptt | None = None
        # Of a batch that is used in several steps, the weights are the rollout's in the first one only.
        if torch.is_grad_enabled() and self.args.depth:
            rule = self._bptt(self.args.depth, stale=self.state.global_step != self._rolled_out)
        return self._scored(model, input_ids, attention_mask, logits_to_keep, batch_size, rule, compute_entropy)

    def _bptt(self, depth: Depth, stale: bool) -> Bptt:
        """How a gradient flows through the thoughts of a forward; `stale`: of states that other weights made."""
        head = distribution_head(self._base_model(), self.args.residual, self.temperature)
        observe = self._observe if depth else None
        return Bptt(depth, self.args.bptt_tolerance, self.args.bptt_terms, stale, head, observe)

    def _observe(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    def _scored(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        rule: Bptt | None,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities and entropies (B, C), a few rows at once, thinking as in the batch's rollout."""
        thinking, own = self._thinking, logits_to_keep
        # In shards, all processes must run as many columns; what is padded is cut off again below.
        input_ids, attention_mask, logits_to_keep = as_long_as_any(self.model, input_ids, attention_mask, own)
        if thinking is not None:
            aligned = replace(thinking.aligned(len(self._fillers) + logits_to_keep), bptt=rule)
            thinking = None if self._is_reference(model) else aligned
        size = batch_size or len(input_ids)
        score = self._score_fused if self._has_fused_head(model) else self._score_plain
        scores = []  # of each few rows: log-probabilities and entropies (b, C)
        for rows in (slice(start, start + size) for start in range(0, len(input_ids), size)):
            inputs = {"thinking_inputs": thinking.rows(rows)} if thinking is not None else {}
            scores.append(score(model, input_ids[rows], attention_mask[rows], logits_to_keep, inputs))
        logps, entropies = (torch.cat(column)[:, :own] for column in zip(*scores, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _on_triton(self) -> bool:
        return self.accelerator.device.type == "cuda" and trl_utils._ChunkedLogProbFunction is not None

    def _trl_scores(self) -> bool:
        """Whether TRL's own log-probabilities run here: its head needs triton and a GPU, up to 1.15."""
        return (self._on_triton() or hasattr(trl_utils, "_use_triton")) and backend_of(self._base_model()).fused_head

    def _has_fused_head(self, model: nn.Module) -> bool:
        return self._on_triton() and backend_of(self.accelerator.unwrap_model(model)).fused_head

    def _score_fused(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        width: int,
        thinking: dict[str, ThinkingInputs],
    ) -> tuple[Tensor, Tensor]:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-width] = -100  # the prompt's: only completions are scored
        with self.accelerator.autocast():
            outputs = model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **thinking
            )
        entropy = outputs.entropy if outputs.entropy is not None else torch.zeros_like(outputs.log_probs)
        return outputs.log_probs[:, -width:], entropy[:, -width:]

    def _score_plain(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        width: int,
        thinking: dict[str, ThinkingInputs],
    ) -> tuple[Tensor, Tensor]:
        inner = causal_lm(self.accelerator.unwrap_model(model))
        with self.accelerator.autocast():
            return forward_scores(model, inner, input_ids, attention_mask, width, self.temperature, **thinking)

    # --- data, metrics -----------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        self._data_order.sampler = super()._get_train_sampler(dataset)
        return self._data_order.sampler

    def _record_ratios(self, shares: Tensor) -> None:
        """embeds_ratio: mean a; hidden_ratio: mean sqrt(1 - a²); over thinking positions, a averaged over d."""
        totals = self.accelerator.reduce(shares, reduction="sum")  # (3,): of a, of sqrt(1 - a²), positions
        self._record("embeds_ratio", totals[0] / totals[2].clamp(min=1))
        self._record("hidden_ratio", totals[1] / totals[2].clamp(min=1))

    def _record_length(self, thinking: ThinkingInputs, tokens: list[list[int]]) -> None:
        """thinking/length: mean tokens that think, without forced ones; thinking/share: theirs of all tokens."""
        counted = (float(thinking.mask[:, len(self._fillers) :].sum()), sum(map(len, tokens)), len(tokens))
        counts = torch.tensor(counted, device=self.accelerator.device)
        thought, written, rows = self.accelerator.reduce(counts, reduction="sum")
        self._record("thinking/length", thought / rows)
        self._record("thinking/share", thought / written.clamp(min=1))

    def _record(self, name: str, value: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value.item())
