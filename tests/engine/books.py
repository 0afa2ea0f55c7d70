# SPDX-License-Identifier: Apache-2.0
"""What an engine has given out, against what it has; and faults for its loader."""

import time
from collections.abc import Callable
from typing import Any

import toppings
from toppings.errors import DeviceError

# So slow that the loads of tiny adapters (up to 150 kB) take several passes.
SLOW_LINK = toppings.Link(bytes_per_second=10e6, latency_seconds=1e-4)


def check_books(engine: toppings.Engine) -> None:
    """Every block is free or held once; a slot is pinned while a request holds it."""
    running, waiting = engine._scheduler.running, engine._scheduler.waiting
    held = [b for r in running for b in r.blocks]
    free = list(engine._pool._free)
    assert sorted(held + free) == list(range(1, engine._pool.num_blocks + 1))
    for queue in (running, waiting):
        assert [r.id for r in queue] == sorted(r.id for r in queue)
    assert not set(running) & set(waiting)
    for request in running:
        assert not request.finished
        assert len(request.blocks) >= engine._pool.blocks_for(request.num_computed)
        assert (request.slot >= 0) == (request.image is not None)
    for request in waiting:
        assert not request.finished
        assert (request.blocks, request.num_computed) == ([], 0)
        assert request.slot < 0 or engine._loading.prefetches
        assert request.ticket is None or request.slot >= 0
    slots = engine._attached.slots
    for request in [*running, *waiting]:
        if request.slot >= 0:
            assert slots.find(request.image.digest) == request.slot
    pinned = {r.slot for r in [*running, *waiting] if r.slot >= 0}
    if engine._cached is not None:
        pinned |= set(engine._cached.by_name.values())
    # The loader holds a pin, too, until the last copy of a load has ended, cancelled or not.
    eventually(lambda: slots.stats().pinned == len(pinned))


def check_empty(engine: toppings.Engine) -> None:
    check_books(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_kv_blocks == engine._pool.num_blocks


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.perf_counter() + seconds
    while not holds():
        assert time.perf_counter() < end
        time.sleep(1e-3)


class FailingTicket:
    """A ticket whose load fails on its way to layer `layer`."""

    def __init__(self, ticket: Any, layer: int) -> None:
        self._ticket, self._layer = ticket, layer

    @property
    def slot(self) -> int:
        return self._ticket.slot

    @property
    def status(self) -> str:
        return "failed" if self._ticket.num_arrived >= self._layer else "loading"

    def seconds_until(self, layer: int) -> float:
        return self._ticket.seconds_until(layer)

    def wait(self, layer: int, stream: int = 0) -> None:
        self._ticket.wait(min(layer, max(self._layer - 1, 0)), stream)
        if layer >= self._layer:
            raise DeviceError("copy: expected it to run, got a planted fault")

    def wait_for_all(self, timeout_seconds: float | None = None) -> bool:
        if self._layer and not self._ticket.wait_for(self._layer - 1, timeout_seconds):
            return False
        raise DeviceError("copy: expected it to run, got a planted fault")

    def cancel(self) -> None:
        self._ticket.cancel()

    def raise_priority(self, priority: str) -> None:
        self._ticket.raise_priority(priority)


class FaultyLoader:
    """The engine's loader, whose loads fail at layer `at`: 0 before anything, None never."""

    def __init__(self, engine: toppings.Engine) -> None:
        self._loader = engine._attached.loader
        self.at: int | None = None
        self.refuses = False  # load() itself raises
        self.tickets: list[Any] = []
        engine._attached.loader = self

    def load(self, slot: int, priority: str = "normal") -> Any:
        if self.refuses:
            raise DeviceError("stream: expected one, got a planted fault")
        ticket = self._loader.load(slot, priority)
        self.tickets.append(ticket if self.at is None else FailingTicket(ticket, self.at))
        return self.tickets[-1]

    def stats(self) -> Any:
        return self._loader.stats()
