"""Thinking in transformers' continuous batching, which packs requests of all lengths into one forward; has no maths.

Hooks on the model's forward stand where the engine calls it: before, every packed position that thinks is given its
state; after, the state that each new token is sampled from is kept. They see the engine's own forwards only, and
go with its manager. Requests share the engine's blocks of prompts alone: thoughts are not in the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrpo_patches.thinking.backbone import ratio_of, thinking_backbone
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import thinking_table
from hrpo_thinking.request import ThinkingRequest, check_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

    from hrpo_patches.thinking.decoding import Sampling

_CHILD = "__child#"  # between the name of a request and the number of its fork
_SHARING = ("mark_complete_blocks", "mark_shareable_blocks_as_complete")  # from transformers 5.2x on, and before


@dataclass(frozen=True)
class NewToken:
    """A token that this step of the engine samples.

    Attributes:
        row: of the packed sequence, the last one of its request.
        record: of its request; None for a plain one.
        index: of the token in its completion.
    """

    row: int
    record: ThinkingRequest | None
    index: int


class BatchThinking:
    """What a manager's requests think; each has a record, until the engine ends or drops it.

    Args:
        manager: of the engine, not yet started.
        model: the causal language model that it runs.
        tokenizer: spells the answer marker.
        forced: how many forced thoughts every completion begins with.
        filler: the id of the token that they are.

    """

    def __init__(
        self,
        manager: Any,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        forced: int = 0,
        filler: int | None = None,
    ) -> None:
        self.manager, self.model = manager, model
        self.backbone = thinking_backbone(model)
        thinking = ThinkingConfig.of(self.backbone.config)
        assert thinking is not None  # thinking_backbone has checked it
        self.residual = thinking.residual
        self.table: Any = thinking_table(tokenizer, thinking, self.backbone.config.vocab_size).numpy()
        self.forced, self.filler = forced, filler
        self.records: dict[str, ThinkingRequest] = {}
        self.plain: set[str] = set()  # requests that do not think
        self._names: set[str] = set()  # of requests that were given one and have not ended
        self._sampled: list[NewToken] = []  # from `_before` a forward to `_after` it
        self._lock = RLock()  # users' threads add requests, the engine's prepares a step from them
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._guard_requests()
        self._guard_results()
        self._guard_steps()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.records.clear()

    def take(self, output: Any) -> Any:
        """The engine's output of a finished request, with what it thought, of which nothing is kept here.

        Returns:
            `output` with thinking_states (C, d), thinking_mask (C) bool, thinking_ratio (C) float32 and
            thinking_residual, as `generate` has them, for its generated tokens; unchanged if it did not think.
        """
        record, tokens = self.records.get(output.request_id), output.generated_tokens
        self._hand_down(output.request_id)
        self._drop(output.request_id)
        if record is None or not tokens or output.error:
            return output
        mask = torch.tensor([record.read(i, token) for i, token in enumerate(tokens)])
        states = torch.stack(record.states[: len(tokens)])
        output.thinking_states, output.thinking_mask = states, mask.to(states.device)
        output.thinking_ratio = ratio_of(self.backbone, tokens, mask).to(states.device)
        output.thinking_residual = self.residual
        return output

    def _hand_down(self, name: str) -> None:
        """Let the forks of a request that ends with its first token, before they are made, think as it does."""
        for state in self.manager.batch_processor.scheduler._requests_to_fork if self.manager.batch_processor else ():
            for i in range(state.num_children if state.request_id == name else 0):
                if name in self.records:
                    self.records[f"{name}{_CHILD}{i}"] = self.records[name].copy(1)
                elif name in self.plain:
                    self.plain.add(f"{name}{_CHILD}{i}")

    def _drop(self, name: str) -> None:
        """Keep nothing of a request."""
        self.records.pop(name, None)
        self.plain.discard(name)
        self._names.discard(name)

    # --- the engine's forward --------------------------------------------------------------------------------------

    def _runs(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward with these arguments is the engine's: others may use the model meanwhile."""
        processor = self.manager.batch_processor
        return processor is not None and kwargs.get("cache") is processor.cache

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Give every packed row that thinks its state, and note the rows that tokens are sampled from."""
        if not self._runs(kwargs):
            return None
        rows: list[int] = []
        states: list[Tensor] = []  # of these rows
        self._sampled, row = [], 0
        # The batch is one sequence (1, L): the new tokens of each request, one request after the other.
        for future in self.manager.batch_processor.inputs_and_outputs.requests_in_batch:
            request, width = future.state, future.query_length
            record, prompt = self._record(request), prompt_length(request)
            start = request.position_offset - width  # its position of `row`
            if record is not None:
                # Only completion tokens think. After a preemption they are computed again, many at once.
                for position in range(max(prompt, start), request.position_offset):
                    index = position - prompt
                    if record.read(index, token_at(request, position)):
                        rows.append(row + position - start)
                        states.append(record.states[index])
            row += width
            if future.has_new_token:  # else a part of a long prompt, of which nothing is sampled yet
                self._sampled.append(NewToken(row - 1, record, request.position_offset - prompt))
        kwargs["output_last_hidden_state"] = True
        if rows:
            kwargs["thinking_inputs"] = self._inputs(rows, states, kwargs["input_ids"].shape[1])
        return args, kwargs

    def _inputs(self, rows: list[int], states: list[Tensor], length: int) -> ThinkingInputs:
        """States and mask of a packed sequence of this length, of which `rows` think."""
        stacked = torch.stack(states)
        mask = torch.zeros(1, length, dtype=torch.bool, device=stacked.device)
        at = torch.tensor(rows, device=stacked.device)  # one copy to the device: a list would be copied for each use
        mask[0, at] = True
        packed = stacked.new_zeros(1, length, stacked.shape[1])
        packed[0, at] = stacked
        return ThinkingInputs(packed, mask, self.residual)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the state that each new token is sampled from, and let forced thoughts be sampled as the filler."""
        if not self._runs(kwargs):
            return
        rows = [token.row for token in self._sampled]  # empty in a step that reads prompts alone
        at = torch.tensor(rows, dtype=torch.long, device=output.last_hidden_state.device)
        hidden = output.last_hidden_state[0, at]  # (new tokens, d)
        # Logits are those of all rows, or of the sampled ones in their order.
        all_rows = output.logits.shape[1] == output.last_hidden_state.shape[1] and "logits_to_keep" not in kwargs
        for i, token in enumerate(self._sampled):
            if token.record is None:
                continue
            token.record.keep(token.index, hidden[i])
            if token.record.forces(token.index):
                logits = output.logits[0, token.row if all_rows else i]
                logits.fill_(-torch.inf)
                logits[self.filler] = 0.0

    def _record(self, request: RequestState) -> ThinkingRequest | None:
        """The record of an engine's request, made at its first step; None for a plain one."""
        name, parent = request.request_id, request.request_id.rpartition(_CHILD)[0]
        if name not in self.records and parent in self.plain:
            self.plain.add(name)
        if name in self.plain:
            return None
        if name not in self.records:
            if parent in self.records:  # a fork: it has the prompt and the first token of its parent
                tokens = request.position_offset - prompt_length(request) + 1
                self.records[name] = self.records[parent].copy(tokens)
            else:
                self.records[name] = ThinkingRequest(self.table, self.forced)
        return self.records[name]

    # --- the engine's requests and blocks --------------------------------------------------------------------------

    def _guard_requests(self) -> None:
        """Let the manager take plain requests beside thinking ones, and refuse what could not be thought."""
        manager, add, add_many = self.manager, self.manager.add_request, self.manager.add_requests

        def add_requests(*args: Any, **kwargs: Any) -> Any:
            with self._lock:  # all of them or none are in the next step, so that a seed samples the same each time
                return add_many(*args, **kwargs)

        def add_request(
            input_ids: list[int],
            request_id: str | None = None,
            max_new_tokens: int | None = None,
            *args: Any,
            thinking: bool = True,
            **kwargs: Any,
        ) -> Any:
            with self._lock:
                self._check_new(request_id, max_new_tokens, thinking)
                if request_id is not None:
                    self._names.add(request_id)
                    if not thinking:
                        self.plain.add(request_id)
                added = add(input_ids, request_id, max_new_tokens, *args, **kwargs)
                if added is None and request_id is not None:
                    self._drop(request_id)
            return added

        manager.add_request, manager.add_requests = add_request, add_requests

    def _guard_results(self) -> None:
        """Hand out thoughts with the results of finished requests."""
        router = self.manager.output_router
        deliver, deliver_batch = router.deliver, router.deliver_batch

        def completed(output: GenerationOutput) -> Any:
            return self.take(output) if output.is_finished() else output

        router.deliver = lambda output: deliver(completed(output))
        router.deliver_batch = lambda outputs: deliver_batch([completed(output) for output in outputs])

    def _guard_steps(self) -> None:
        """Prepare no step while requests are added, and forget requests when the engine does."""
        create = self.manager._create_batch_processor

        @wraps(create)
        def create_batch_processor() -> Any:
            processor = create()
            self._guard_blocks(processor.cache)
            prepare, clear = processor.prepare_next_batch, processor.scheduler.clear_cancelled_requests

            def prepare_next_batch() -> Any:
                with self._lock:
                    return prepare()

            def clear_cancelled_requests() -> Any:
                dropped = clear()
                for request in dropped:  # not when they are cancelled: they may be in a step
                    self._drop(request.request_id)
                return dropped

            processor.prepare_next_batch = prepare_next_batch
            processor.scheduler.clear_cancelled_requests = clear_cancelled_requests
            return processor

        self.manager._create_batch_processor = create_batch_processor

    def _check_new(self, name: str | None, new: int | None, thinking: bool) -> None:
        """Raise `InputError` for a request that cannot be told from others, or not be thought in its length."""
        if thinking not in (True, False):
            raise InputError(f"add_request(thinking=...) must be True or False, not {thinking!r}.")
        if not thinking and name is None:
            raise InputError("a plain request beside thinking ones needs a request_id of its own.")
        if name in self._names:
            raise InputError(f"a request {name!r} has not ended yet; wait for that, or take another request_id.")
        if thinking and new is not None:
            check_room(self.forced, new)

    def _guard_blocks(self, cache: Any) -> None:
        """Share no block that holds a thought: requests of equal tokens may have thought otherwise."""
        if hasattr(cache, "_thinks"):
            return
        name = next(name for name in _SHARING if hasattr(cache, name))
        mark, search = getattr(cache, name), cache.search_prefix_match

        def mark_complete(request: RequestState, count: int) -> None:
            if request.request_id in self.plain or request.position_offset <= prompt_length(request):
                mark(request, count)

        def search_prefix_match(request_id: str, tokens: list[int]) -> int:
            record = self.records.get(request_id)
            thought = len(record.states) if record is not None else 0  # of a preempted request: its last tokens
            return int(search(request_id, tokens[: len(tokens) - thought]))

        setattr(cache, name, mark_complete)
        cache.search_prefix_match, cache._thinks = search_prefix_match, True


def prompt_length(request: RequestState) -> int:
    """The number of prompt tokens of an engine's request, also of one that it computes again."""
    return int(request._true_initial_tokens or len(request.initial_tokens))


def token_at(request: RequestState, position: int) -> int:
    """The token at a position of an engine's request."""
    first = len(request.initial_tokens)
    token = request.initial_tokens[position] if position < first else request.generated_tokens[position - first]
    return int(token)


def begin(
    manager: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation_config: Sampling
) -> None:
    """Let a manager that has not started think as `generation_config` asks; its end is that of the thinking."""
    forced = generation_config.thoughts or 0
    manager.thinking = BatchThinking(manager, model, tokenizer, forced, generation_config.filler_token_id)
    for name in ("stop", "destroy"):
        setattr(manager, name, _then(getattr(manager, name), manager.thinking.close))


def _then(first: Callable[..., Any], last: Callable[[], None]) -> Callable[..., Any]:
    """`first`, after which `last` is called, also if it fails."""

    @wraps(first)
    def both(*args: Any, **kwargs: Any) -> Any:
        try:
            return first(*args, **kwargs)
        finally:
            last()

    return both


@contextmanager
def thinking_batches(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within, managers that `model` makes for a generation that thinks read the marker by this tokenizer."""
    before, model._batch_tokenizer = getattr(model, "_batch_tokenizer", None), tokenizer
    try:
        yield
    finally:
        model._batch_tokenizer = before
