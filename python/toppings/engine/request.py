# SPDX-License-Identifier: Apache-2.0
"""A request: what was asked, what has been answered, and what it holds while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal

import torch

from toppings._runtime import Image, Ticket
from toppings.engine.sampling import SamplingParams
from toppings.errors import RequestFailedError

__all__ = ["FinishReason", "Request"]

FinishReason = Literal["stop", "length", "abort", "error"]


class Request:
    """Iterates over its tokens as they are generated, stepping the engine while there is none to
    give.

    ``output`` holds the tokens so far, ``finish_reason`` is None until it ends: "stop" (end of
    sequence or a stop sequence), "length" (max_tokens), "abort", or "error" (``error`` says why;
    iterating raises RequestFailedError).
    """

    def __init__(
        self,
        id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str | None,
        fetched: Future[Image] | None,
        step: Callable[[], object],
        abort: Callable[[Request], None],
    ) -> None:
        self.id, self.prompt, self.params = id, tuple(prompt), params
        self.adapter = adapter
        self.output: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.arrival_time = time.perf_counter()
        self.token_times: list[float] = []
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        # The scheduler's: which positions are in the KV cache, and where.
        self.num_computed = 0
        self.blocks: list[int] = []
        self.bypassed = 0
        # The way of its adapter: read into an image, pinned in a slot, loaded there.
        self.fetched = fetched  # None once it is the image
        self.image: Image | None = None
        self.slot = -1
        self.ticket: Ticket | None = None  # while the load is under way
        self._step, self._abort = step, abort

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and output at positions [start, stop)."""
        split = len(self.prompt)
        return [
            *self.prompt[start:stop],
            *self.output[max(start - split, 0) : max(stop - split, 0)],
        ]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    def append(self, token: int, eos: frozenset[int]) -> None:
        """Takes the next token and ends the request when it is its last."""
        self.output.append(token)
        self.token_times.append(time.perf_counter())
        if (token in eos and not self.params.ignore_eos) or self.params.stops(self.output):
            self.finish_reason = "stop"
        elif len(self.output) >= self.params.max_tokens:
            self.finish_reason = "length"

    def fail(self, why: str) -> None:
        # The reason first: who iterates in another thread reads it once this has finished.
        self.error = why
        self.finish_reason = "error"

    def abort(self) -> None:
        """Ends the request now; what it held is free again. Does nothing once it has finished."""
        self._abort(self)

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            finished = self.finished  # before the tokens: another thread may be stepping
            while given < len(self.output):
                yield self.output[given]
                given += 1
            if finished and self.error is not None:
                raise RequestFailedError(f"request {self.id}: {self.error}")
            if finished:
                return
            self._step()

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        return f"Request({self.id}, adapter={self.adapter!r}, {len(self.output)} tokens, {state})"
