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
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.inputs import Bptt, Depth, depth_of
from hrpo_thinking.parts import NONE, RATES, RESIDUALS, residual_of
from hrpo_thinking.request import FORCED_ALONE, check_residual

if TYPE_CHECKING:
    from transformers import TrainingArguments as _Arguments
    from trl import GRPOConfig
else:
    _Arguments = object
    GRPOConfig = trl_class("trl.trainer.grpo_config", "GRPOConfig")

REFERENCES = ("base", "start")
SHARED = ("residual", "answer_start", "thoughts", "filler")  # options of ThinkingConfig that are fields here, too


def require_least(args: object, least: float, *names: str) -> None:
    """Raise `InputError` unless each of these options is a number of at least `least`."""
    for name in names:
        value = getattr(args, name)
        require(value is not None and not value < least, f"{name} must be at least {least}, not {value}.")


def require_steps(args: _Arguments) -> None:
    """Raise `InputError` for a run of no steps, which transformers would take for one of some epochs."""
    require(args.max_steps != 0, "max_steps must be at least 1, or -1 for num_train_epochs, not 0.")


class _Spellings:
    """How a command line spells a residual: those that are registered by the time it asks, and "none"."""

    def __iter__(self) -> Iterator[str]:
        return iter((*RESIDUALS, NONE))


def _thinking(name: str, default: object) -> Any:
    """A field for an option of ThinkingConfig, with its help."""
    return field(default=default, metadata={"help": OPTIONS[name].help})


def _rate(group: str, what: str) -> Any:
    return field(default=RATES[group], metadata={"help": f"Learning rate of {what}."})


@dataclass
class ThinkingArguments(_Arguments):
    """The options of thinking of a trainer's arguments, which are mixed with transformers' or TRL's.

    `thinking` says how a model thinks; some of its options have a field of their own here. What is left open is the
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
        require_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        require_least(self, 0, "learning_rate", "lr_residual_gate", "lr_residual_Lambda", "lr_thinking_projection")
        require(0 <= self.seed < 2**32, f"seed must be from 0 to 2**32 - 1, not {self.seed}.")
        require(
            not self.fp16 or (not self.use_cpu and torch.accelerator.is_available()),
            "fp16=True needs a GPU: on a CPU accelerate neither casts nor scales; use bf16=True.",
        )
        require(
            self.residual is None or self.neftune_noise_alpha is None,
            "neftune_noise_alpha adds noise to every embedding in training mode, also to what thoughts are made from; "
            "remove it, or train plain GRPO with residual='none'.",
        )

    @property
    def from_start(self) -> bool:
        """Whether the loss has a KL divergence from the model that training began from."""
        return False

    def _read_bptt(self) -> None:
        """Read how far the gradient flows, also by the name that the option had before version 0.3."""
        if self.replay_passes is not None:
            passes = str(self.replay_passes)
            require(
                passes == "all" or (passes.isdecimal() and int(passes)),
                f"replay_passes must be a whole number from 1, or 'all', not {self.replay_passes!r}.",
            )
            depth = "exact" if passes == "all" else str(int(passes) - 1)
            require(
                self.bptt is None or depth_of(self.bptt) == depth_of(depth),
                f"bptt={self.bptt} and replay_passes={passes} differ; remove replay_passes.",
            )
            text = f"replay_passes={passes} is deprecated and will be removed in 0.4; use bptt={depth}."
            warnings.warn(text, FutureWarning, stacklevel=4)
            self.bptt, self.replay_passes = depth, None
        # None stays: the default depends on the backend of the model, which is not known yet.
        if self.bptt is not None:
            self.bptt = depth_of(self.bptt)  # type: ignore[assignment]
        Bptt(self.depth, self.bptt_tolerance, self.bptt_terms)  # checks them

    def _read_thinking(self) -> None:
        """Read `thinking` into a dict, and into the fields that say the same."""
        thinking = self.thinking
        if isinstance(thinking, str):
            try:
                thinking = json.loads(thinking)
            except ValueError as error:
                raise InputError(f"thinking is not valid JSON: {error}.") from None
        require(
            isinstance(thinking, (ThinkingConfig, dict, type(None))),
            f"thinking must be a ThinkingConfig or a dict of its options, not {thinking!r}.",
        )
        options: dict[str, Any] = asdict(thinking) if isinstance(thinking, ThinkingConfig) else thinking or {}
        require(
            not options or self.residual is not None,
            "thinking cannot be combined with residual='none', which is plain GRPO; remove one of them.",
        )
        for name in [name for name in SHARED if name in options]:
            own, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            require(
                own in (default, options[name]),
                f"{name} is {own!r}, and thinking says {options[name]!r}; remove one of them.",
            )
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
        require(self.reference in REFERENCES, f"reference must be one of {REFERENCES}, not {self.reference!r}.")
        if self.residual is not None or self.thoughts:
            self._refuse_what_cannot_think()
        require(
            self.residual is not None or not (self.bptt or self.reference != "base"),
            "bptt and reference are about thinking; they cannot be combined with residual='none'.",
        )
        require(
            self.reference != "start" or not self.sync_ref_model,
            "sync_ref_model moves the reference, and reference='start' keeps it; remove one of them.",
        )
        require(
            self.residual is None or not self.sync_ref_model,
            "sync_ref_model mixes this model's weights into a reference that lacks thinking modules; remove it.",
        )
        require(
            self.num_generations is None or self.num_generations >= 2,
            f"num_generations (--group_size) must be at least 2, not {self.num_generations}: GRPO compares the "
            f"rewards of a prompt's completions.",
        )
        super().__post_init__()  # TRL reads JSON, and derives num_generations and batch sizes
        for name in ("generation_kwargs", "model_init_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            text = f"{name} must be a dict, on a command line as JSON, not {value!r}."
            require(isinstance(value, (dict, type(None))), text)
        require_least(self, 1, "num_iterations", "max_completion_length")
        require_steps(self)
        if self.residual is not None:
            self.check_distribution()

    def check_distribution(self) -> None:
        """Raise `InputError` for completions whose log-probabilities the loss would misread.

        The loss divides logits by `temperature` and applies nothing else. TRL allows top-p and the like while the loss
        computes the log-probabilities itself. vLLM's log-probabilities are those of the truncated distribution.
        """
        kwargs: dict[str, Any] = self.generation_kwargs or {}  # type: ignore[assignment]  # TRL has read it
        temperature = kwargs.get("temperature", self.temperature)
        require(
            temperature == self.temperature,
            f"generation_kwargs say temperature={temperature}, and the loss takes {self.temperature}; set temperature "
            f"itself.",
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
        # `to_dict` leaves the fields that the patches add out of a config that does not think.
        known = GenerationConfig().to_dict() | dict.fromkeys(("thinking", "thoughts", "filler_token_id"))
        for name in self.generation_kwargs or {}:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise InputError(f"generation_kwargs: {name!r} is not an option of GenerationConfig{hint}")

    def _refuse_what_cannot_think(self) -> None:
        if self.use_transformers_continuous_batching:
            self._check_states_of("continuous batching")
        if self.use_vllm:
            self.check_vllm()
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        options = {
            "use_transformers_paged=True": self.use_transformers_paged,
            "cache_implementation='paged'": "paged" in (self.cache_implementation, kwargs.get("cache_implementation")),
            f"num_beams={kwargs.get('num_beams')}": (kwargs.get("num_beams") or 1) > 1,
        }
        for option, chosen in options.items():
            require(
                not chosen,
                f"{option} cannot think: its decoding hands no hidden state from step to step. Remove it, or train "
                f"plain GRPO with residual='none'.",
            )

    def _check_states_of(self, engine: str) -> None:
        """Raise `InputError` for an engine that does not return what this run's thoughts are made from."""
        if self.residual is None:
            raise InputError(FORCED_ALONE)
        check_residual(self.residual, engine)

    def check_vllm(self) -> None:
        """Raise `InputError` for rollouts in vLLM that cannot think."""
        self._check_states_of("vLLM")
        options = {
            "vllm_mode='server'": self.vllm_mode != "colocate",
            f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size}": self.vllm_tensor_parallel_size != 1,
            f"vllm_model_impl={self.vllm_model_impl!r}": self.vllm_model_impl not in ("auto", "vllm"),
        }
        for option, chosen in options.items():
            why = "rollouts in vLLM need vllm_mode='colocate', one GPU an engine."
            require(not chosen, f"{option} cannot think; {why}")

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
