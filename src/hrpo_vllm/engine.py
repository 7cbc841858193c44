"""What an engine is told of a model that thinks: its config, its worker, its scheduler, and what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers import AutoTokenizer

from hrpo_thinking.config import NEEDS_US, ThinkingConfig, record_of, scaled_to_embeddings
from hrpo_thinking.errors import InputError
from hrpo_thinking.families import FAMILIES, check_vllm
from hrpo_thinking.request import FORCED_ALONE, check_residual, check_room
from hrpo_vllm.names import (
    CANNOT,
    KEY,
    NO_FILLER,
    PREFIX,
    THINKING,
    THOUGHTS,
    architecture,
    cannot,
    check_version,
    is_thinking,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.config import ModelConfig, VllmConfig

CPU_WORKER, GPU_WORKER = "hrpo_vllm.cpu_workers.ThinkingCPUWorker", "hrpo_vllm.workers.ThinkingGPUWorker"


class ThinkingFamily:
    """The config of a merged model, whose type stock transformers refuses, as that of its family.

    Its classes are not made again in each process: an engine sends a config to the others that it starts.
    """

    architectures: Any
    model_type: str

    def __post_init__(self, **kwargs: Any) -> None:
        check_vllm(self.model_type.removesuffix(NEEDS_US))
        super().__post_init__(**kwargs)  # type: ignore[misc]  # a config's
        if self.architectures:
            self.architectures = [architecture(name) for name in self.architectures]


CONFIGS: dict[str, type[Any]] = {}  # by model type
for _kind, _family in FAMILIES.items():
    _parents = (ThinkingFamily, getattr(transformers, _family.config))
    _own = {"model_type": _kind + NEEDS_US, "__module__": __name__}
    CONFIGS[_kind] = globals()[PREFIX + _family.config] = type(PREFIX + _family.config, _parents, _own)


class ThinkingEngine:
    """vLLM asks this class what the configuration of an engine on a model that thinks must be."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Nothing: all is said of the whole engine, below."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Choose the worker and the scheduler that think.

        Raises:
            InputError: the engine was asked for something that cannot think.
        """
        check_version()
        check_engine(vllm_config)
        guard_requests()
        parallel, on_cpu = vllm_config.parallel_config, vllm_config.device_config.device_type == "cpu"
        parallel.worker_cls = CPU_WORKER if on_cpu else GPU_WORKER
        vllm_config.scheduler_config.scheduler_cls = "hrpo_vllm.workers.thinking_scheduler"


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise `InputError` for an engine that cannot think as its model does."""
    thinking = ThinkingConfig.of(vllm_config.model_config.hf_config)
    if thinking is None:
        raise InputError("the model's config does not say how it thinks; merge it with `hrpo merge`, or serve it so.")
    check_residual(thinking.residual, "vLLM")
    parallel, worker = vllm_config.parallel_config, vllm_config.parallel_config.worker_cls
    record = record_of(thinking, vllm_config.model_config.hf_config.thinking)
    vllm_config.model_config.hf_config.thinking = record
    unmeasured = scaled_to_embeddings(record) and record.get("embedding_norm") is None
    asked = (  # in the order of CANNOT
        vllm_config.speculative_config is not None,
        parallel.pipeline_parallel_size > 1,
        vllm_config.kv_transfer_config is not None,
        vllm_config.model_config.enable_prompt_embeds,
        vllm_config.scheduler_config.scheduler_cls is not None,
        worker != "auto" and not worker.startswith("vllm."),
    )
    if wrong := [what for what, one in zip(CANNOT, asked, strict=True) if one]:
        raise cannot(wrong[0])
    if unmeasured and parallel.tensor_parallel_size > 1:
        raise cannot("tensor parallelism before the norm of the embeddings was measured")


# What would read forced thoughts as text, or forbid them, by its name in SamplingParams: whether a value of it does.
_READS_FILLERS: dict[str, Any] = {
    "allowed_token_ids": lambda value, filler: value is not None and filler not in value,
    "bad_words": lambda value, filler: value,
    "stop": lambda value, filler: value,
    "structured_outputs": lambda value, filler: value is not None,
    "repetition_detection": lambda value, filler: value is not None,
    "trace_decode_token_ids": lambda value, filler: value,
    "thinking_token_budget": lambda value, filler: value is not None,
}


def check_request(params: SamplingParams, room: int, record: dict[str, Any], filler: Callable[[], int | None]) -> None:
    """Raise `InputError` for a request that cannot be thought as it asks.

    Args:
        params: its SamplingParams, with all that vLLM adds to them.
        room: how many tokens its completion can have.
        record: the model's `config.thinking`.
        filler: finds the token that a forced thought is, None without one.
    """
    options = params.extra_args or {}
    thinking, key = options.get(THINKING, True), options.get(KEY)
    if thinking not in (True, False):
        raise InputError(f"{THINKING} must be true or false, not {thinking!r}.")
    if key is not None and not isinstance(key, str):
        raise InputError(f"{KEY} must be a text, not {key!r}.")
    if key is not None and params.n != 1:
        raise InputError(f"{KEY} names the states of one completion; ask for n=1.")
    forced = options.get(THOUGHTS, record["thoughts"] if thinking else 0)
    if not isinstance(forced, int) or isinstance(forced, bool) or forced < 0:
        raise InputError(f"{THOUGHTS} must be a whole number from 0, not {forced!r}.")
    if not thinking:
        if forced:
            raise InputError(FORCED_ALONE)
        return
    beams = params.max_tokens == 1 and not params.detokenize and (params.logprobs or 0) > 1
    if beams and THINKING not in options:
        raise InputError(
            "beam search cannot think: each of its steps is a request of its own. If this is none, and one token is "
            f"all that is asked for, say extra_args={{{THINKING!r}: False}}."
        )
    if not record["in_checkpoint"]:
        raise InputError(
            "the model cannot think yet because no weights have arrived: send them, and then call "
            "hrpo_vllm.weights_arrived(llm)."
        )
    if forced:
        _check_forced(params, forced, room, filler())


def _check_forced(params: SamplingParams, forced: int, room: int, filler: int | None) -> None:
    check_room(forced, room, THOUGHTS, "the smaller of max_tokens and what the prompt leaves of the context")
    if filler is None:
        raise InputError(NO_FILLER)
    if filler in params.all_stop_token_ids:
        raise InputError(f"the filler of forced thoughts, token {filler}, ends a completion; name another one.")
    if wrong := [name for name, reads in _READS_FILLERS.items() if reads(getattr(params, name, None), filler)]:
        raise InputError(f"{wrong[0]} cannot be combined with forced thoughts; set {THOUGHTS}=0.")


def tokenizer_of(model_config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that an engine is to read by, from vLLM's config of the model."""
    more = {"revision": model_config.tokenizer_revision, "trust_remote_code": model_config.trust_remote_code}
    return AutoTokenizer.from_pretrained(model_config.tokenizer, **more)


def refusal(error: InputError) -> InputError:
    """The same error as one of vLLM's, too, to which a server answers that the request is bad, and why."""
    from vllm.exceptions import VLLMValidationError

    class RequestError(InputError, VLLMValidationError):
        parameter = value = None

    return RequestError(str(error))


def guard_requests() -> None:
    """Let vLLM refuse, before any work, requests that cannot be thought; others pass as they are."""
    from vllm.v1.engine.input_processor import InputProcessor

    process: Any = InputProcessor.process_inputs
    if process.__module__ == __name__:  # ours: `wraps` leaves the module alone
        return

    @wraps(process, assigned=("__name__", "__qualname__", "__doc__"))
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request, config = process(self, *args, **kwargs), self.model_config
        if is_thinking(config) and request.sampling_params is not None:
            params, record = request.sampling_params, config.hf_config.thinking
            room = min(params.max_tokens, config.max_model_len - len(request.prompt_token_ids))

            def filler() -> int | None:
                if not hasattr(self, "thinking_filler"):
                    found = tokenizer_of(config).get_vocab().get(record["filler"])
                    self.thinking_filler = found if found is not None and found < config.get_vocab_size() else None
                return cast(int | None, self.thinking_filler)

            try:
                check_request(params, room, record, filler)
            except InputError as error:
                raise refusal(error) from None
        return request

    InputProcessor.process_inputs = process_inputs
