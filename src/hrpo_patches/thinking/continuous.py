"""Thinking in transformers' continuous batching, which packs requests of all lengths into one forward; has no maths.

Hooks on the model's forward stand where the engine calls it: before, every packed position that thinks is given its
state; after, the state that each new token is sampled from is kept. They see the engine's own forwards only, and
go with its manager. Requests share the engine's blocks of prompts alone: thoughts are not in the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hrpo_patches.thinking.backbone import ratio_of, thinking_backbone
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import thinking_table
from hrpo_thinking.request import ThinkingRequest, check_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHILD = "__child#"  # between the name of a request and the number of its fork
_SHARING = ("mark_complete_blocks", "mark_shareable_blocks_as_complete")  # from transformers 5.2x on, and before


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
        self, manager: Any, model: Any, tokenizer: PreTrainedTokenizerBase, forced: int = 0, filler: int | None = None
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
        self._news: list[tuple[int, ThinkingRequest | None, int]] = []  # (row of the last token, record, next index)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._guard_manager()

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

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        processor = self.manager.batch_processor
        if processor is None or kwargs.get("cache") is not processor.cache:
            return None  # another's forward
        rows, states, at, self._news = [], [], 0, []
        for future in processor.inputs_and_outputs.requests_in_batch:
            state, width = future.state, future.query_length
            record, prompt = self._record(state), prompt_length(state)
            start = state.position_offset - width
            for i in range(max(0, prompt - start), width) if record is not None else ():
                index = start + i - prompt
                if record is not None and record.read(index, token_at(state, start + i)):
                    rows.append(at + i)
                    states.append(record.states[index])
            at += width
            if future.has_new_token:
                self._news.append((at - 1, record, state.position_offset - prompt))
        kwargs["output_last_hidden_state"] = True
        if rows:
            kwargs["thinking_inputs"] = self._inputs(rows, states, kwargs["input_ids"].shape[1])
        return args, kwargs

    def _inputs(self, rows: list[int], states: list[Tensor], length: int) -> ThinkingInputs:
        kept = torch.stack(states)
        mask = torch.zeros(1, length, dtype=torch.bool, device=kept.device)
        at = torch.tensor(rows, device=kept.device)  # one copy to the device: a list would be copied for each use
        mask[0, at] = True
        whole = kept.new_zeros(1, length, kept.shape[1])
        whole[0, at] = kept
        return ThinkingInputs(whole, mask, self.residual)

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        processor = self.manager.batch_processor
        if processor is None or kwargs.get("cache") is not processor.cache:
            return
        rows = [row for row, _, _ in self._news]  # which may be none
        at = torch.tensor(rows, dtype=torch.long, device=output.last_hidden_state.device)
        hidden = output.last_hidden_state[0, at]
        in_rows = output.logits.shape[1] == output.last_hidden_state.shape[1]  # a logit for each packed position
        for i, (row, record, index) in enumerate(self._news):
            if record is not None:
                record.keep(index, hidden[i])
            if record is not None and record.forces(index):
                logits = output.logits[0, row if in_rows and "logits_to_keep" not in kwargs else i]
                logits.fill_(-torch.inf)
                logits[self.filler] = 0.0

    def _record(self, state: Any) -> ThinkingRequest | None:
        above = state.request_id.rpartition(_CHILD)[0]
        if state.request_id not in self.records and above in self.plain:
            self.plain.add(state.request_id)
        if state.request_id in self.plain:
            return None
        if state.request_id not in self.records:
            parent = self.records.get(above)
            if parent is not None:  # a fork: it has the prompt and the first token of its parent
                own = parent.copy(state.position_offset - prompt_length(state) + 1)
            else:
                own = ThinkingRequest(self.table, self.forced)
            self.records[state.request_id] = own
        return self.records[state.request_id]

    # --- the engine's requests and blocks --------------------------------------------------------------------------

    def _guard_manager(self) -> None:
        """Let the manager take plain requests, hand out thoughts with results, and share no block that holds one."""
        manager, lock = self.manager, RLock()
        create, add, add_many = manager._create_batch_processor, manager.add_request, manager.add_requests
        router = manager.output_router
        deliver, deliver_batch = router.deliver, router.deliver_batch

        def create_batch_processor() -> Any:
            processor = create()
            self._guard_blocks(processor.cache)
            prepare, clear = processor.prepare_next_batch, processor.scheduler.clear_cancelled_requests

            def prepare_next_batch() -> Any:
                with lock:
                    return prepare()

            def clear_cancelled_requests() -> Any:
                dropped = clear()
                for state in dropped:  # not when they are cancelled: they may be in a step
                    self._drop(state.request_id)
                return dropped

            processor.prepare_next_batch = prepare_next_batch
            processor.scheduler.clear_cancelled_requests = clear_cancelled_requests
            return processor

        def add_requests(*args: Any, **kwargs: Any) -> Any:
            with lock:  # all of them or none are in the next step, so that a seed samples the same each time
                return add_many(*args, **kwargs)

        def add_request(
            input_ids: list[int],
            request_id: str | None = None,
            max_new_tokens: int | None = None,
            *args: Any,
            thinking: bool = True,
            **kwargs: Any,
        ) -> Any:
            with lock:
                self._check_new(request_id, max_new_tokens, thinking)
                if request_id is not None:
                    self._names.add(request_id)
                    if not thinking:
                        self.plain.add(request_id)
                added = add(input_ids, request_id, max_new_tokens, *args, **kwargs)
                if added is None and request_id is not None:
                    self._drop(request_id)
            return added

        def done(output: Any) -> Any:
            return self.take(output) if output.is_finished() else output

        manager._create_batch_processor, manager.add_request = create_batch_processor, add_request
        manager.add_requests = add_requests
        router.deliver = lambda output: deliver(done(output))
        router.deliver_batch = lambda outputs: deliver_batch([done(output) for output in outputs])

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
        if hasattr(cache, "_thinks"):
            return
        name = next(name for name in _SHARING if hasattr(cache, name))
        mark, search = getattr(cache, name), cache.search_prefix_match

        def mark_complete(state: Any, count: Any) -> None:
            if state.request_id in self.plain or state.position_offset <= prompt_length(state):
                mark(state, count)

        def search_prefix_match(request_id: str, tokens: list[int]) -> int:
            record = self.records.get(request_id)
            thought = len(record.states) if record is not None else 0
            return int(search(request_id, tokens[: len(tokens) - thought] if thought else tokens))

        setattr(cache, name, mark_complete)
        cache.search_prefix_match, cache._thinks = search_prefix_match, True


def prompt_length(state: Any) -> int:
    """The number of prompt tokens of an engine's request, also of one that it computes again."""
    return int(state._true_initial_tokens or len(state.initial_tokens))


def token_at(state: Any, position: int) -> int:
    """The token at a position of an engine's request."""
    first = len(state.initial_tokens)
    token = state.initial_tokens[position] if position < first else state.generated_tokens[position - first]
    return int(token)


def begin(manager: Any, model: Any, tokenizer: Any, generation_config: Any) -> None:
    """Let a manager that has not started think as `generation_config` asks; its end is that of the thinking."""
    forced = generation_config.thoughts or 0
    manager.thinking = BatchThinking(manager, model, tokenizer, forced, generation_config.filler_token_id)
    for name in ("stop", "destroy"):
        setattr(manager, name, _then(getattr(manager, name), manager.thinking.close))


def _then(first: Any, second: Any) -> Any:
    def both(*args: Any, **kwargs: Any) -> Any:
        try:
            return first(*args, **kwargs)
        finally:
            second()

    return both


@contextmanager
def thinking_batches(model: Any, tokenizer: Any) -> Iterator[None]:
    """Within, managers that `model` makes for a generation that thinks read the marker by this tokenizer."""
    before, model._batch_tokenizer = getattr(model, "_batch_tokenizer", None), tokenizer
    try:
        yield
    finally:
        model._batch_tokenizer = before
