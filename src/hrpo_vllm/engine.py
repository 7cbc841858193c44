"""What an engine is told of a model that thinks: its config, its worker, its scheduler, and what it cannot do."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from hrpo_thinking.config import NEEDS_US, ThinkingConfig, scaled_to_embeddings
from hrpo_thinking.errors import InputError
from hrpo_thinking.request import check_residual
from hrpo_vllm import KEY, THINKING, THOUGHTS, architecture, check_version, is_thinking


class ThinkingFamily:
    """The config of a merged model, whose type stock transformers refuses, as that of its family.

    Its classes are not made anew in each process: an engine sends a config to the others that it starts.
    """

    architectures: Any

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # a config's
        if self.architectures:
            self.architectures = [architecture(name) for name in self.architectures]


class ThinkingLlamaConfig(ThinkingFamily, LlamaConfig):
    model_type = LlamaConfig.model_type + NEEDS_US


class ThinkingQwen2Config(ThinkingFamily, Qwen2Config):
    model_type = Qwen2Config.model_type + NEEDS_US


class ThinkingQwen3Config(ThinkingFamily, Qwen3Config):
    model_type = Qwen3Config.model_type + NEEDS_US


class ThinkingEngine:
    """vLLM asks this class what the configuration of an engine on a model that thinks has to be."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: all is said of the whole engine, below."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Choose the worker and the scheduler that think.

        Raises:
            InputError: the engine was asked for something that cannot think.
        """
        check_version()
        check_engine(vllm_config)
        guard_requests()
        parallel, on_cpu = vllm_config.parallel_config, vllm_config.device_config.device_type == "cpu"
        parallel.worker_cls = "hrpo_vllm.workers." + ("ThinkingCPUWorker" if on_cpu else "ThinkingGPUWorker")
        vllm_config.scheduler_config.scheduler_cls = "hrpo_vllm.workers.thinking_scheduler"


def check_engine(vllm_config: Any) -> None:
    """Raise `InputError` for an engine that cannot think as its model does."""
    thinking = ThinkingConfig.of(vllm_config.model_config.hf_config)
    if thinking is None:
        raise InputError("the model's config does not say how it thinks; merge it with `hrpo merge`, or serve it so.")
    check_residual(thinking.residual, "vLLM")
    parallel, worker = vllm_config.parallel_config, vllm_config.parallel_config.worker_cls
    record = vllm_config.model_config.hf_config.thinking
    unmeasured = scaled_to_embeddings(record) and record.get("embedding_norm") is None
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "a transfer of keys and values between engines": vllm_config.kv_transfer_config is not None,
        "prompts given as embeddings": vllm_config.model_config.enable_prompt_embeds,
        "an own scheduler": vllm_config.scheduler_config.scheduler_cls is not None,
        "an own worker": worker != "auto" and not worker.startswith("vllm."),
        "tensor parallelism before the norm of the embeddings was measured": (
            unmeasured and parallel.tensor_parallel_size > 1
        ),
    }
    if wrong := [what for what, asked in refused.items() if asked]:
        raise InputError(f"a model that thinks does not go with {wrong[0]} in vLLM; leave it out.")


def check_request(params: Any) -> None:
    """Raise `InputError` for the sampling parameters of a request that cannot be thought as it asks."""
    options = params.extra_args or {}
    thinking, forced, key = options.get(THINKING, True), options.get(THOUGHTS, 0), options.get(KEY)
    if thinking not in (True, False):
        raise InputError(f"{THINKING} has to be true or false, not {thinking!r}.")
    if not isinstance(forced, int) or forced < 0 or (params.max_tokens is not None and forced >= params.max_tokens):
        raise InputError(f"{THOUGHTS} has to be a whole number from 0 to below max_tokens, not {forced!r}.")
    if key is not None and params.n != 1:
        raise InputError(f"{KEY} names the states of one completion; ask for n=1.")
    beams = params.max_tokens == 1 and not params.detokenize and (params.logprobs or 0) > 1
    if thinking and beams and THINKING not in options:
        raise InputError(
            "beam search cannot think: each of its steps is a request of its own. If this is none, and one token is "
            f"all that is asked for, say extra_args={{{THINKING!r}: False}}."
        )


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
    if hasattr(process, "__wrapped__") and process.__module__ == __name__:
        return

    @wraps(process, assigned=("__name__", "__qualname__", "__doc__"))
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if is_thinking(self.model_config) and hasattr(params, "extra_args"):
            try:
                check_request(params)
            except InputError as error:
                raise refusal(error) from None
        return process(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.process_inputs = process_inputs
