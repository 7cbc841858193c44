"""Where vLLM's workers, model runners and scheduler meet the thoughts; each seam is a few lines, and no maths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu_worker import Worker

from hrpo_thinking.errors import InputError
from hrpo_vllm.names import THINKING, THOUGHTS
from hrpo_vllm.requests import EngineThoughts, Scheduled

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from hrpo_vllm.models import ThinkingModel


class ThinkingWorker:
    """What a worker gains: it tells the thoughts which requests come and go, and hands them out."""

    model_runner: Any
    use_v2_model_runner: bool

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        out = super().load_model(*args, **kwargs)  # type: ignore[misc]
        if not self.use_v2_model_runner:
            follow_runner_v1(self.model_runner)
        return out

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's, whose made-up requests would think: in training no weights have arrived for it yet."""
        model = self.model_runner.get_model()
        model.warming_up = True
        try:
            return super().compile_or_warm_up_model()  # type: ignore[misc]
        finally:
            model.warming_up = False

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        follow_scheduler(self.thoughts, scheduler_output)
        self.model_runner.num_scheduled = scheduler_output.num_scheduled_tokens
        return super().execute_model(scheduler_output, *args)  # type: ignore[misc]

    @property
    def thoughts(self) -> EngineThoughts:
        thoughts: EngineThoughts = self.model_runner.get_model().thoughts
        return thoughts

    def check_thinking(self) -> None:
        """Raise `InputError` while thinking weights are missing."""
        self.model_runner.get_model().check_arrived()

    def take_thoughts(self, keys: list[str], running: list[str]) -> dict[str, tuple[bytes, str, list[int]]] | str:
        """`EngineThoughts.take` for `hrpo_vllm.take_thoughts`: bytes, dtype and shape; or what is wrong.

        Neither tensors nor the class of an error travel between processes.
        """
        try:
            return {key: packed(states) for key, states in self.thoughts.take(keys, running).items()}
        except InputError as error:
            return str(error)

    def thinking_counts(self) -> dict[str, int]:
        """`EngineThoughts.counts`, and how many requests anything is held of."""
        return self.thoughts.counts | {"held": self.thoughts.held()}


def packed(states: Tensor) -> tuple[bytes, str, list[int]]:
    """The bytes of a tensor on the CPU, its dtype and its shape."""
    values = states.contiguous().view(torch.uint8).numpy().tobytes()
    return values, str(states.dtype).removeprefix("torch."), list(states.shape)


class ThinkingGPUWorker(ThinkingWorker, Worker): ...


def follow_scheduler(thoughts: EngineThoughts, output: SchedulerOutput) -> None:
    """Tell the thoughts which requests a step (vLLM's SchedulerOutput) ends, pauses, begins and brings back."""
    thoughts.finish(output.finished_req_ids)
    thoughts.pause(output.preempted_req_ids or ())
    for new in output.scheduled_new_reqs:
        tokens = new.prefill_token_ids or new.prompt_token_ids  # the second runner gets resumed requests here, too
        if thoughts.knows(new.req_id):
            thoughts.resume(new.req_id, tokens)
        elif new.sampling_params is not None:
            prompt = len(new.prompt_token_ids)
            thoughts.add(new.req_id, prompt, tokens[prompt:], new.sampling_params.extra_args)
    cached = output.scheduled_cached_reqs
    for name in cached.resumed_req_ids:
        thoughts.resume(name, cached.all_token_ids[name])


def follow_runner_v1(runner: Any) -> None:
    """Let the first model runner prepare the thoughts right before each of its forwards."""
    forward = runner._model_forward

    def thinking_forward(*args: Any, **kwargs: Any) -> Any:
        batch, step, row = runner.input_batch, [], 0
        for name, start in zip(batch.req_ids, batch.num_computed_tokens_cpu.tolist(), strict=False):
            step.append(Scheduled(name, row, start, runner.num_scheduled[name]))
            row += runner.num_scheduled[name]
        prepare(runner.get_model(), step, kwargs["input_ids"])
        return forward(*args, **kwargs)

    runner._model_forward = thinking_forward


def model_state_class() -> type[Any]:
    """The second model runner's: it prepares the thoughts with the inputs of each forward."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class ThinkingModelState(DefaultModelState):
        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            rows = zip(
                input_batch.req_ids,
                input_batch.query_start_loc_np.tolist(),
                input_batch.num_computed_tokens_np.tolist(),
                input_batch.num_scheduled_tokens.tolist(),
                strict=False,
            )
            step = [Scheduled(*row) for row in rows]
            prepare(self.model, step, input_batch.input_ids)
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            return inputs

    return ThinkingModelState


def prepare(model: ThinkingModel, step: list[Scheduled], input_ids: Tensor) -> None:
    """`EngineThoughts.prepare`, for a model whose weights are there."""
    if model.thoughts.prepare(step, input_ids) and not model.warming_up:
        model.check_arrived()


def thinking_scheduler(*args: Any, vllm_config: VllmConfig, **kwargs: Any) -> Any:
    """vLLM's own scheduler, whose thinking requests share cached keys with requests of the same prompt only.

    Thoughts are not in the tokens that name a cached block, so each request names, beside them, where its thinking
    begins and how many thoughts are forced. That comes before a salt of the user's, who therefore cannot say it.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    scheduler: Any = (AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler)(
        *args, vllm_config=vllm_config, **kwargs
    )
    add = scheduler.add_request

    def add_request(request: Any) -> None:
        options = (request.sampling_params and request.sampling_params.extra_args) or {}
        thinks = request.sampling_params is not None and options.get(THINKING, True)
        if thinks or request.cache_salt:
            own = f"thinks from {request.num_prompt_tokens}, forced {options.get(THOUGHTS)}" if thinks else "plain"
            request.cache_salt = f"{own}: {request.cache_salt or ''}"
            request.block_hashes.clear()
            request.update_block_hashes()
        add(request)

    scheduler.add_request = add_request
    return scheduler
