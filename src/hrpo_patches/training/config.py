"""HRPOConfig: GRPOConfig with thinking."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from hrpo_patches.thinking.decoding import changed_distribution
from hrpo_patches.training.trl_classes import trl_class
from hrpo_thinking.config import OPTIONS, ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import Bptt, Depth, depth_of
from hrpo_thinking.parts import NONE, RATES, RESIDUALS, residual_of
from hrpo_thinking.request import check_residual

if TYPE_CHECKING:
    from transformers import TrainingArguments as _Arguments
    from trl import GRPOConfig
else:
    _Arguments = object
    GRPOConfig = trl_class("trl.trainer.grpo_config", "GRPOConfig")

REFERENCES = ("base", "start")
SHARED = ("residual", "answer_start", "thoughts", "filler")  # options of ThinkingConfig that are fields here, too


class _Spellings:
    """How a command line spells a residual: those that are registered by the time it asks, and "none"."""

    def __iter__(self) -> Iterator[str]:
        return iter((*RESIDUALS, NONE))


def _thinking(name: str, default: Any) -> Any:
    """A field for an option of ThinkingConfig, with its help."""
    return field(default=default, metadata={"help": OPTIONS[name].help})


def _rate(group: str, what: str) -> Any:
    return field(default=RATES[group], metadata={"help": f"Learning rate of {what}."})


@dataclass
class ThinkingArguments(_Arguments):
    """The options of thinking of a trainer's arguments, which are mixed with transformers' or TRL's.

    How a model thinks is said by `thinking`, or by the options of it that have a field here. What is left open is the
    model's own, or `ThinkingConfig`'s default.
    """

    thinking: ThinkingConfig | str | dict[str, Any] | None = field(
        default=None, metadata={"help": "Options of ThinkingConfig; a dict, on a command line as JSON."}
    )
    residual: str | None = field(
        default=ThinkingConfig.residual,
        metadata={"help": OPTIONS["residual"].help[:-1] + ", or none for plain GRPO.", "choices": _Spellings()},
    )
    answer_start: str = _thinking("answer_start", ThinkingConfig.answer_start)
    thoughts: int | None = _thinking("thoughts", None)
    filler: str | None = _thinking("filler", None)
    bptt: str | None = field(
        default=None,
        metadata={
            "help": "Backpropagation through time, how many thoughts back the gradient flows: 0, the published "
            "gradient; k, truncated after k thoughts; exact, through all, by the adjoint series; sequential, the same "
            "by decoding them one by one. Default: exact, and 0 on unsloth."
        },
    )
    bptt_tolerance: float = field(
        default=Bptt.tolerance,
        metadata={"help": "bptt=exact leaves terms out whose norm is at most this share of the first one's."},
    )
    bptt_terms: int = field(
        default=Bptt.terms,
        metadata={"help": "Terms after which bptt=exact warns that its series does not converge."},
    )
    replay_passes: str | None = field(
        default=None, metadata={"help": "Deprecated, removed in 0.4: k passes are bptt=k-1, all is exact."}
    )
    lr_residual_gate: float = _rate("gate", "the two gates")
    lr_residual_Lambda: float = _rate("Lambda", "Lambda")
    lr_thinking_projection: float = _rate("projection", "thinking_projection")
    monitor: bool = field(
        default=True,
        metadata={"help": "Measure thinking at every log line, warn early, keep all lines in monitor.jsonl."},
    )

    def read_thinking(self) -> None:
        """Check the options of thinking, and read them into one form; for `__post_init__`.

        Raises:
            InputError: an option is out of its range, or is given in two ways.
        """
        self.residual = residual_of(self.residual)
        self._read_thinking()
        self._read_bptt()
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to 2**32 - 1, not {self.seed}.")
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise InputError("fp16=True needs a GPU: on a CPU accelerate neither casts nor scales; use bf16=True.")
        if self.residual is not None and self.neftune_noise_alpha is not None:
            raise InputError(
                "neftune_noise_alpha adds noise to every embedding in training mode, also to what thoughts are made "
                "from; remove it, or train plain GRPO with residual='none'."
            )
        for name in ("learning_rate", "lr_residual_gate", "lr_residual_Lambda", "lr_thinking_projection"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)}.")

    @property
    def from_start(self) -> bool:
        """Whether the loss has a KL divergence from the model that training began from."""
        return False

    def _read_bptt(self) -> None:
        """Read how far the gradient flows, also as it was said before version 0.3."""
        if self.replay_passes is not None:
            passes = str(self.replay_passes)
            if passes != "all" and not (passes.isdecimal() and int(passes)):
                raise InputError(f"replay_passes must be a whole number from 1, or 'all', not {self.replay_passes!r}.")
            depth = "exact" if passes == "all" else str(int(passes) - 1)
            if self.bptt is not None and depth_of(self.bptt) != depth_of(depth):
                raise InputError(f"bptt={self.bptt} and replay_passes={passes} differ; remove replay_passes.")
            text = f"replay_passes={passes} is deprecated and will be removed in 0.4; use bptt={depth}."
            warnings.warn(text, FutureWarning, stacklevel=4)
            self.bptt, self.replay_passes = depth, None
        if self.bptt is not None:
            self.bptt = depth_of(self.bptt)  # type: ignore[assignment]
        Bptt(self.depth, self.bptt_tolerance, self.bptt_terms)  # checks them

    def _read_thinking(self) -> None:
        """Read `thinking` into a dict, and into the fields that say the same."""
        given = self.thinking
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise InputError(f"thinking is no JSON: {error}.") from None
        if not isinstance(given, (ThinkingConfig, dict, type(None))):
            raise InputError(f"thinking must be a ThinkingConfig or a dict of its options, not {given!r}.")
        options: dict[str, Any] = asdict(given) if isinstance(given, ThinkingConfig) else given or {}
        if options and self.residual is None:
            raise InputError(
                "thinking cannot be combined with residual='none', which is plain GRPO; remove one of them."
            )
        for name in [name for name in SHARED if name in options]:
            own, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if own not in (default, options[name]):
                raise InputError(f"{name} is {own!r}, and thinking says {options[name]!r}; remove one of them.")
            setattr(self, name, options[name])
        self.thinking = options or None
        ThinkingConfig.from_dict(self._options())  # also where nothing is blended, and thoughts are pauses

    def _options(self) -> dict[str, Any]:
        own = {name: value for name in SHARED if (value := getattr(self, name)) is not None}
        return (self.thinking or {}) | own  # type: ignore[operator]

    @property
    def chosen(self) -> dict[str, Any]:
        """The options of thinking that this run chooses, by name; none for plain GRPO."""
        return self._options() if self.residual is not None else {}

    @property
    def depth(self) -> Depth:
        """How far the gradient flows through thoughts; the trainer has set `bptt` to its backend's if it was None."""
        return depth_of(self.bptt or 0)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the thinking groups, by group name."""
        return {
            "gate": self.lr_residual_gate,
            "Lambda": self.lr_residual_Lambda,
            "projection": self.lr_thinking_projection,
        }


@dataclass
class HRPOConfig(ThinkingArguments, GRPOConfig):
    """TRL's `GRPOConfig` with the options of thinking.

    Raises:
        InputError: an option asks for a kind of generation that cannot think, is out of its range, or is given in both
            ways.
    """

    reference: str = field(
        default="base",
        metadata={
            "choices": REFERENCES,
            "help": "What the KL divergence is from: base, the base model with adapters off, not thinking; or start, "
            "the model that training began from, thinking as it does.",
        },
    )

    def __post_init__(self) -> None:
        self.read_thinking()
        if self.reference not in REFERENCES:
            raise InputError(f"reference must be one of {REFERENCES}, not {self.reference!r}.")
        if self.residual is not None or self.thoughts:
            self._refuse_what_cannot_think()
        if self.residual is None and (self.bptt or self.reference != "base"):
            raise InputError("bptt and reference are about thinking; they cannot be combined with residual='none'.")
        if self.reference == "start" and self.sync_ref_model:
            raise InputError("sync_ref_model moves the reference, and reference='start' keeps it; remove one of them.")
        if self.residual is not None and self.sync_ref_model:
            raise InputError(
                "sync_ref_model mixes this model's weights into a reference that lacks thinking modules; remove it."
            )
        if self.num_generations is not None and self.num_generations < 2:
            raise InputError(f"num_generations must be at least 2, not {self.num_generations}: rewards are compared.")
        super().__post_init__()
        for name in ("generation_kwargs", "model_init_kwargs", "chat_template_kwargs"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise InputError(f"{name} must be a dict, on a command line as JSON, not {getattr(self, name)!r}.")
        self._refuse_what_does_nothing()
        if self.residual is not None:
            self.check_distribution()

    def _refuse_what_does_nothing(self) -> None:
        """Raise `InputError` for values that train nothing, or uphill."""
        for name in ("num_iterations", "max_completion_length"):
            value = getattr(self, name)
            if value is None or value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        if self.max_steps == 0:
            raise InputError("max_steps must be at least 1, or -1 for num_train_epochs, not 0.")

    def check_distribution(self) -> None:
        """Raise `InputError` for completions whose log-probabilities the loss would misread.

        The loss divides logits by `temperature`, and knows nothing else. What narrows the distribution further is
        TRL's to allow while the log-probabilities are the loss's own; vLLM's are of the narrowed one.
        """
        kwargs: dict[str, Any] = self.generation_kwargs or {}  # type: ignore[assignment]  # TRL has read it
        temperature = kwargs.get("temperature", self.temperature)
        if temperature != self.temperature:
            raise InputError(
                f"generation_kwargs say temperature={temperature}, and the loss takes {self.temperature}; set "
                f"temperature itself."
            )
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return
        own = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        changed = changed_distribution(own | {"structured_outputs": self.vllm_structured_outputs_regex} | kwargs)
        if changed is not None:
            raise InputError(
                f"{changed[0]}={changed[1]!r} cannot be combined with vLLM's importance sampling correction: vLLM's "
                f"log-probabilities are of the narrowed distribution and the loss's of the whole one, so that the "
                f"weight of a long completion vanishes; remove it, or set vllm_importance_sampling_correction=False."
            )

    def check_generation_kwargs(self) -> None:
        """Raise `InputError` for generation options that `generate` does not know; vLLM has names of its own."""
        if self.use_vllm:
            return
        known = GenerationConfig().to_dict() | dict.fromkeys(("thinking", "thoughts", "filler_token_id"))
        for name in self.generation_kwargs or {}:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise InputError(f"generation_kwargs: {name!r} is not an option of GenerationConfig{hint}")

    def _refuse_what_cannot_think(self) -> None:
        if self.use_transformers_continuous_batching:
            if self.residual is None:
                raise InputError("forced thoughts of a run that does not think need generate; leave thoughts out.")
            check_residual(self.residual, "continuous batching")
        if self.use_vllm:
            self.check_vllm()
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        refused = {
            "use_transformers_paged=True": self.use_transformers_paged,
            "cache_implementation='paged'": "paged" in (self.cache_implementation, kwargs.get("cache_implementation")),
            f"num_beams={kwargs.get('num_beams')}": (kwargs.get("num_beams") or 1) > 1,
        }
        if wrong := [option for option, given in refused.items() if given]:
            raise InputError(
                f"{wrong[0]} cannot think: its decoding hands no hidden state from step to step. Remove it, or "
                f"train plain GRPO with residual='none'."
            )

    def check_vllm(self) -> None:
        """Raise `InputError` for rollouts in vLLM that cannot think."""
        if self.residual is None:
            raise InputError("forced thoughts of a run that does not think need generate; leave thoughts out.")
        check_residual(self.residual, "vLLM")
        refused = {
            "vllm_mode='server'": self.vllm_mode != "colocate",
            f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size}": self.vllm_tensor_parallel_size != 1,
            f"vllm_model_impl={self.vllm_model_impl!r}": self.vllm_model_impl not in ("auto", "vllm"),
        }
        if wrong := [option for option, given in refused.items() if given]:
            raise InputError(
                f"{wrong[0]} cannot think; rollouts in vLLM need vllm_mode='colocate', one GPU an engine."
            )

    @property
    def from_start(self) -> bool:
        """Whether the loss has a KL divergence from the model that training began from."""
        return self.reference == "start" and self.beta != 0.0

    @property
    def engine(self) -> str:
        """What makes the completions, by the name that `--engine` has for it."""
        if self.use_vllm and self.vllm_mode == "colocate":
            return "vllm"
        return "continuous" if self.use_transformers_continuous_batching else "generate"
