# SPDX-License-Identifier: Apache-2.0
"""Which requests take part in the next pass, and with how many tokens."""

from bisect import insort
from dataclasses import dataclass, field

from toppings.engine.batch import Chunk
from toppings.engine.kv_cache import BlockPool
from toppings.engine.loading import Loading
from toppings.engine.request import Request

__all__ = ["Schedule", "Scheduler"]

# A request whose adapter finds no slot lets this many younger ones pass, then nobody: a stream of
# requests for resident adapters can't starve it.
MAX_BYPASSED = 64


@dataclass
class Schedule:
    """One pass: a chunk per request; and who ended because an adapter couldn't be had."""

    chunks: dict[Request, Chunk] = field(default_factory=dict)
    failed: list[Request] = field(default_factory=list)
    num_preempted: int = 0


class Scheduler:
    """Continuous batching with chunked prefill, first come first served.

    Every pass decodes all running requests first (one token each), then prefills with what is left
    of the token budget, then admits waiting requests whose adapter can be had in time; one whose
    adapter is still coming is passed by younger ones. When KV blocks run out, the youngest running
    request gives up its own and returns to the queue; its tokens are computed again later. The
    oldest is never preempted for another and every request alone fits the pool (the engine checks
    that at the door), so each one finishes.
    """

    def __init__(
        self, loading: Loading, pool: BlockPool, max_running: int, max_batch_tokens: int
    ) -> None:
        self._loading, self._pool = loading, pool
        self._max_running, self._max_batch_tokens = max_running, max_batch_tokens
        self.waiting: list[Request] = []  # by age
        self.running: list[Request] = []  # by age
        self._failed: list[Request] = []  # not told to anybody yet

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=_age)

    def advance(self) -> None:
        """Begins loads for waiting requests; the next schedule names those that failed."""
        failed = self._loading.advance(self.waiting)
        for request in failed:
            self.remove(request)
        self._failed += failed

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is; what it held is free again."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            self._release(request)
        if request.finished:  # whoever keeps it doesn't keep its adapter from being evicted
            request.image = request.fetched = None

    def preempt(self, request: Request) -> None:
        """Back to the queue, to be computed again from its first token."""
        self.remove(request)
        self.add(request)

    def undo(self, request: Request, chunk: Chunk) -> None:
        """As if the chunk had not been scheduled: what was computed before stays."""
        fresh = len(chunk.new_blocks)
        self._pool.free(request.blocks[len(request.blocks) - fresh :])
        del request.blocks[len(request.blocks) - fresh :]

    def schedule(self) -> Schedule:
        self.advance()
        schedule = Schedule(failed=self._failed)
        self._failed = []
        budget = self._max_batch_tokens
        for request in [r for r in self.running if _pending(r) == 1]:
            budget -= self._continue(request, 1, schedule)
        for request in [r for r in self.running if _pending(r) > 1]:
            budget -= self._continue(request, min(_pending(request), budget), schedule)
        if not schedule.num_preempted:  # what was just taken back isn't given to a newcomer
            self._admit(budget, schedule)
        return schedule

    def _continue(self, request: Request, count: int, schedule: Schedule) -> int:
        """Adds `count` tokens of a running request to the pass; preempts the youngest while blocks
        are missing.
        """
        if count < 1 or request not in self.running:
            return 0
        need = self._pool.blocks_for(request.num_computed + count) - len(request.blocks)
        while not self._pool.can_allocate(need):
            victim = self.running[-1]
            schedule.chunks.pop(victim, None)
            schedule.num_preempted += 1
            self.preempt(victim)
            if victim is request:
                return 0
        self._schedule(request, count, need, schedule)
        return count

    def _admit(self, budget: int, schedule: Schedule) -> None:
        passed: list[Request] = []
        for request in list(self.waiting):
            if budget < 1 or len(self.running) >= self._max_running:
                return
            state = self._loading.state(request, alone=not self.running)
            if state == "coming":
                continue
            # Room for all of the prompt and the first token, so that admission isn't followed by
            # preemption at once.
            if not self._pool.can_allocate(self._pool.blocks_for(request.num_tokens + 1)):
                return
            if state == "no_slot":
                if request.bypassed >= MAX_BYPASSED:
                    return
                passed.append(request)
                continue
            self._loading.take(request)
            if request.finished:  # its load couldn't even begin
                self.remove(request)
                schedule.failed.append(request)
                continue
            self.waiting.remove(request)
            insort(self.running, request, key=_age)
            for older in passed:
                older.bypassed += 1
            request.bypassed = 0
            count = min(request.num_tokens, budget)
            budget -= count
            self._schedule(request, count, self._pool.blocks_for(count), schedule)

    def _schedule(self, request: Request, count: int, need: int, schedule: Schedule) -> None:
        fresh = self._pool.allocate(need)
        request.blocks += fresh
        start = request.num_computed
        schedule.chunks[request] = Chunk(
            request.tokens(start, start + count), start, tuple(request.blocks), request.slot, fresh
        )

    def _release(self, request: Request) -> None:
        self._pool.free(request.blocks)
        request.blocks = []
        request.num_computed = 0
        self._loading.release(request)


def _age(request: Request) -> int:
    return request.id


def _pending(request: Request) -> int:
    return request.num_tokens - request.num_computed
