"""What an engine's requests think, step by step: records on the host, what the next step reads on the device.

Of a position whose token was sampled in the step before, only the device knows the token. So the state that the token
was sampled from, and how far its request has read the answer marker, lie there, a slot a request. What a request
computes again after a preemption is read from its record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hrpo_thinking.errors import InputError
from hrpo_thinking.request import ThinkingRequest
from hrpo_vllm.names import KEY, NO_FILLER, THINKING, THOUGHTS

BOUND = 4 << 30  # bytes


class Scheduled(NamedTuple):
    """A request's share of a step: `tokens` tokens, in the step's rows from `row`, at its positions from `start`."""

    name: str
    row: int
    start: int
    tokens: int


@dataclass
class Running:
    """A request that thinks, while the engine works on it; `known`: tokens that it had when it came (back)."""

    record: ThinkingRequest
    prompt: int
    key: str | None
    slot: int = -1
    known: int = 0


class EngineThoughts(nn.Module):
    """The thoughts of all requests of an engine.

    Args:
        size: d.
        rows: the most tokens of a step.
        requests: the most requests of a step.
        table: the marker's automaton (V, m + 1), on the CPU.
        forced: forced thoughts that a completion begins with, unless its request says otherwise.
        filler: the token that they are.
        dtype: of the states.

    Attributes:
        states, mask: (rows, d) and (rows,) bool, what the forward blends; a captured graph reads them where they are.
        inputs: (rows, d), the blends, which the backbone's graphs read where they are.
        bound: how many bytes of states are kept, for requests with a key that have ended, until they are taken.
        counts: thoughts that were computed again after a preemption, in all, and requests that were.
    """

    states: Tensor
    inputs: Tensor
    mask: Tensor
    last: Tensor
    progress: Tensor
    table: Tensor

    def __init__(
        self, size: int, rows: int, requests: int, table: Tensor, forced: int, filler: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._reads: Any = table.cpu().numpy()
        self.forced, self.filler = forced, filler
        for name, values in (
            ("states", torch.zeros(rows, size, dtype=dtype)),
            ("inputs", torch.zeros(rows, size, dtype=dtype)),
            ("mask", torch.zeros(rows, dtype=torch.bool)),
            ("last", torch.zeros(requests, size, dtype=dtype)),
            ("progress", torch.zeros(requests, dtype=torch.long)),
            ("table", table.to(self._device())),
        ):
            self.register_buffer(name, values, persistent=False)
        self._free = list(range(requests))
        self._running: dict[str, Running] = {}
        self._paused: dict[str, Running] = {}
        self._done: list[tuple[str, ThinkingRequest]] = []  # in the order in which they ended
        self.bound: float = BOUND
        self._step: list[Scheduled] | None = None
        self.counts = {"replayed": 0, "resumed": 0}

    @staticmethod
    def _device() -> torch.device:
        return torch.empty(0).device  # an engine makes its models within that of its own

    # --- the life of a request -------------------------------------------------------------------------------------

    def add(self, name: str, prompt: int, tokens: list[int], options: dict[str, Any] | None) -> None:
        """A request comes, with `tokens` after its prompt's; options: SamplingParams.extra_args.

        Raises:
            InputError: the options ask for what cannot be, or what the tokens were sampled from is not known.
        """
        options = options or {}
        forced, key = options.get(THOUGHTS, self.forced), options.get(KEY)
        if not options.get(THINKING, True):
            return
        if forced and self.filler is None:
            raise InputError(NO_FILLER)
        request = Running(ThinkingRequest(self._reads, int(forced)), prompt, key)
        self._enter(name, request, tokens)

    def resume(self, name: str, tokens: list[int]) -> None:
        """A paused request comes back, with all its `tokens`, its prompt's included; one that does not think, too."""
        if (request := self._paused.pop(name, None)) is not None:
            self.counts["resumed"] += 1
            self._enter(name, request, tokens[request.prompt :])

    def knows(self, name: str) -> bool:
        """Whether a request of that name is paused."""
        return name in self._paused

    def _enter(self, name: str, request: Running, tokens: list[int]) -> None:
        self._leave(name)
        if len(request.record.states) < len(tokens):
            raise InputError(
                f"request {name} comes with tokens whose thoughts are not known; send them as its prompt."
            )
        request.record.resume(tokens)
        request.slot, request.known = self._free.pop(), len(tokens)
        self.progress[request.slot] = request.record.progress
        self._running[name] = request

    def _leave(self, name: str) -> Running | None:
        request = self._running.pop(name, None)
        if request is not None:
            self._free.append(request.slot)
        return request

    def pause(self, names: Iterable[str]) -> None:
        """Requests lose their keys and values, and will come back."""
        for name in names:
            if (request := self._leave(name)) is not None:
                self._paused[name] = request

    def finish(self, names: Iterable[str]) -> None:
        """Requests have ended or were aborted; what they thought is kept if they have a key, up to a bound."""
        for name in names:
            request = self._leave(name) or self._paused.pop(name, None)
            if request is not None:
                self.counts["replayed"] += request.record.replayed
                if request.key is not None and request.record.states:
                    self._done.append((request.key, request.record))
        kept = sum(len(record.states) for _, record in self._done)
        while kept * self.last[0].nbytes > self.bound:
            kept -= len(self._done.pop(0)[1].states)

    def take(self, keys: list[str], running: list[str]) -> dict[str, Tensor]:
        """The states (C, d) on the CPU that each token of the requests with these keys was sampled from, once.

        Args:
            keys: of several requests with one key, the first that ended is taken.
            running: the names of all requests that the engine has not ended. It tells its workers of an end only when
                the next step begins, so that they cannot know.

        Raises:
            InputError: a request with one of the keys runs, or nothing is kept under it; nothing was taken then.
        """
        self._wait()
        asked = set(keys)
        known = [(name, one.key) for kind in (self._running, self._paused) for name, one in kind.items()]
        if busy := [key for name, key in known if key in asked and name in running]:
            raise InputError(f"the request with the key {busy[0]!r} still runs; take its thoughts when it has ended.")
        ended = {name: key for name, key in known if key in asked}
        if lacking := sorted(asked - {key for key, _ in self._done} - set(ended.values())):
            raise InputError(f"nothing was thought under the key {lacking[0]!r}, or too much was since.")
        self.finish(ended)
        return {key: torch.stack(self._pop(key).states) for key in dict.fromkeys(keys)}

    def _pop(self, key: str) -> ThinkingRequest:
        return self._done.pop(next(i for i, (name, _) in enumerate(self._done) if name == key))[1]

    def held(self) -> int:
        """How many requests anything is kept of."""
        return len(self._running) + len(self._paused) + len(self._done)

    # --- a step ----------------------------------------------------------------------------------------------------

    def prepare(self, step: list[Scheduled], input_ids: Tensor) -> int:
        """Before the forward over `input_ids` (rows,): write what its positions blend; returns how many may think."""
        self._step = step
        self.mask[: input_ids.shape[0]] = False
        sampled: tuple[list[int], list[int], list[int]] = ([], [], [])  # rows, slots, whether the marker reads them
        again: list[tuple[int, Tensor]] = []
        for share in step:
            request = self._running.get(share.name)
            if request is None:
                continue
            first = share.start - request.prompt
            for index in range(max(0, first), first + share.tokens):
                row = share.row + index - first
                if index >= request.known:
                    for column, value in zip(
                        sampled, (row, request.slot, not request.record.forces(index)), strict=True
                    ):
                        column.append(value)
                elif request.record.thinks_again(index):
                    again.append((row, request.record.states[index]))
        if again:
            self._write([row for row, _ in again], torch.stack([state for _, state in again]))
        if sampled[0]:
            rows, slots, reads = self._moved(sampled)
            self._read(rows, slots, reads, input_ids)
        return len(again) + len(sampled[0])

    def _read(self, rows: Tensor, slots: Tensor, reads: Tensor, input_ids: Tensor) -> None:
        before = self.progress[slots]
        after = torch.where(reads.bool(), self.table[input_ids[rows].long(), before], before)
        self.progress[slots] = after
        self.mask[rows] = after < self.table.shape[1] - 1
        self.states[rows] = self.last[slots]

    def _write(self, rows: list[int], states: Tensor) -> None:
        self._wait()
        at = self._moved((rows,))[0]
        self.states[at] = states.to(self.states.device)
        self.mask[at] = True

    def observe(self, hidden: Tensor, logits: Tensor | None) -> None:
        """After the forward: `hidden` (requests, d) is what each request's next token is sampled from, by `logits`."""
        step, self._step = self._step, None
        next_ones = []
        for i, share in enumerate(step or ()):
            request = self._running.get(share.name)
            index = share.start + share.tokens - (request.prompt if request is not None else 0)
            if request is not None and index >= max(0, request.known):
                next_ones.append((i, request, index))
        if not next_ones:
            return
        rows, slots = self._moved(([i for i, _, _ in next_ones], [request.slot for _, request, _ in next_ones]))
        kept = hidden[rows]
        self.last[slots] = kept
        for (_, request, index), state in zip(next_ones, self._host(kept).unbind(), strict=True):
            request.record.keep(index, state)
        forced = [i for i, request, index in next_ones if request.record.forces(index)]
        if forced and logits is not None:
            logits[forced] = -torch.inf
            logits[forced, self.filler] = 0.0

    # --- between host and device -----------------------------------------------------------------------------------

    def _moved(self, columns: object) -> Tensor:
        host = torch.tensor(columns, dtype=torch.long, device="cpu", pin_memory=self.last.is_cuda)
        return host.to(self.last.device, non_blocking=True)

    def _host(self, values: Tensor) -> Tensor:
        """A copy on the CPU; from a GPU it is under way until `_wait`, while the next step runs."""
        if not values.is_cuda:
            return values
        return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)

    def _wait(self) -> None:
        if self.last.is_cuda:
            torch.cuda.current_stream().synchronize()
