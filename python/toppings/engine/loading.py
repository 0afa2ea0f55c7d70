# SPDX-License-Identifier: Apache-2.0
"""The way of a request's adapter to the device: read, pinned in a slot, loaded there; and whether a
pass may use it already.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Literal

from toppings._runtime import Image, Ticket
from toppings.attachment import AttachedModel
from toppings.engine.request import Request
from toppings.errors import ToppingsError

__all__ = ["Loading", "Mode", "State", "pause"]

Mode = Literal["cached", "blocking", "async", "layerwise"]
# "ready" for a pass; "coming": being read or loaded; "no_slot": slots or arena are taken.
State = Literal["ready", "coming", "no_slot"]

PREFETCH_WINDOW = 256  # waiting requests that may hold a slot, from the oldest on
RECENT_PASSES = 16  # decode passes that tell a layer's time
PAUSE_SECONDS = 1e-3


class Loading:
    """Pins of slots, and loads into them, for waiting and running requests.

    In the modes that prefetch, a waiting request takes a slot as soon as there is one. Room in the
    arena goes by age: while an older request waits for room, younger ones take slots only of
    adapters that are there already, and those that wait, too, give theirs back to it, the youngest
    first. So a waiting request's pin never keeps an older request waiting, and no load is begun
    only to be given up again.
    """

    def __init__(self, attached: AttachedModel, mode: Mode, max_stall_seconds: float) -> None:
        self._attached, self.mode, self._max_stall = attached, mode, max_stall_seconds
        self._layer_seconds: deque[float] = deque(maxlen=RECENT_PASSES)
        self.num_prefetched = 0

    @property
    def prefetches(self) -> bool:
        return self.mode in ("async", "layerwise")

    @property
    def gates(self) -> bool:
        """A pass may begin before its adapters are there."""
        return self.mode == "layerwise"

    def advance(self, waiting: Sequence[Request]) -> list[Request]:
        """Begins what can begin for waiting requests (by age); those that failed, with the reason
        in them.
        """
        for request in waiting:
            _take_image(request)
            if request.ticket is not None and (why := load_error(request.ticket)) is not None:
                request.fail(why)
        if self.prefetches:
            self._prefetch([r for r in waiting[:PREFETCH_WINDOW] if not r.finished])
        return [r for r in waiting if r.finished]

    def state(self, request: Request, alone: bool) -> State:
        """alone: nobody else would wait for its layers."""
        if request.adapter is None:
            return "ready"
        if request.image is None:
            return "coming"
        if not self.prefetches:
            return "ready" if self._attached.slots.can_acquire(request.image) else "no_slot"
        if request.slot < 0:
            return "no_slot"
        self.drop_arrived(request)
        if request.ticket is None:
            return "ready"
        gated = self.gates and (alone or self._stall(request) <= self._max_stall)
        return "ready" if gated else "coming"

    def take(self, request: Request) -> None:
        """For the next pass: pins its slot, and its layers come before all others. May fail it."""
        if request.image is not None and request.slot < 0:
            self._begin(request, "urgent")
        elif request.ticket is not None:
            request.ticket.raise_priority("urgent")

    def release(self, request: Request) -> None:
        """Gives slot and load back."""
        if request.ticket is not None:
            request.ticket.cancel()  # others that want the load have tickets of their own
            request.ticket = None
        if request.slot >= 0:
            self._attached.slots.release(request.slot)
            request.slot = -1

    def drop_arrived(self, request: Request) -> None:
        if request.ticket is not None and request.ticket.status == "loaded":
            request.ticket = None

    def observe_decode(self, seconds: float) -> None:
        """A pass that only decoded took so long, without waiting for layers."""
        self._layer_seconds.append(seconds / self._attached.shape.num_layers)

    def next_arrival(self, waiting: Sequence[Request]) -> Ticket | Future[Image] | None:
        """What the oldest of them waits for."""
        return next((r.ticket or r.fetched for r in waiting if r.ticket or r.fetched), None)

    def _stall(self, request: Request) -> float:
        """Expected seconds that a pass with this request waits for layers.

        Layer l is needed l times a layer's time after the start. That time is the least of recent
        decode passes, and the newcomer's own tokens make its pass longer than those, so a pass
        rarely waits for longer than this.
        """
        ticket = request.ticket
        if ticket is None:
            return 0.0
        pace = min(self._layer_seconds, default=0.0)
        layers = range(self._attached.shape.num_layers)
        return max(ticket.seconds_until(layer) - layer * pace for layer in layers)

    def _prefetch(self, waiting: Sequence[Request]) -> None:
        short, first = False, True
        for request in waiting:
            if request.image is None:
                continue
            if request.slot < 0:
                if short and not self._is_loaded(request.image):
                    continue
                if not self._claim(request, request.image, waiting):
                    short = not request.finished or short
                    continue
            if request.ticket is not None and first:
                request.ticket.raise_priority("normal")  # one after the other, by age
                first = False

    def _claim(self, request: Request, image: Image, waiting: Sequence[Request]) -> bool:
        """A slot and a load for a waiting request. False: no room, or it failed."""
        younger = [r for r in waiting if r.slot >= 0 and r.id > request.id]
        try:
            while not self._attached.slots.can_acquire(image):
                if not younger:
                    return False
                holder = younger.pop()
                was_loading = holder.ticket is not None
                self.release(holder)
                # Its last copies may be under way still, and the loader lets go only after them.
                if was_loading and not self._attached.slots.can_acquire(image):
                    return False
        except ToppingsError as error:  # it never fits
            request.fail(str(error))
            return False
        before = self._attached.loader.stats().loads
        self._begin(request, "prefetch")
        self.num_prefetched += self._attached.loader.stats().loads - before
        return request.slot >= 0

    def _begin(self, request: Request, priority: str) -> None:
        if request.image is None:
            raise RuntimeError("unreachable: a request without an image begins no load")
        request.slot, resident = self._attached.slots.acquire(request.image)
        if resident:
            return
        try:
            request.ticket = self._attached.loader.load(request.slot, priority)
        except ToppingsError as error:
            self.release(request)
            request.fail(_load_failed(error))

    def _is_loaded(self, image: Image) -> bool:
        slots = self._attached.slots
        slot = slots.find(image.digest)
        layers = range(self._attached.shape.num_layers)
        return slot >= 0 and all(slots.is_published(slot, layer) for layer in layers)


def load_error(ticket: Ticket) -> str | None:
    """Why its load will never be through; None while it may."""
    if ticket.status in ("loading", "loaded"):
        return None
    try:
        ticket.wait_for_all(0.0)
    except Exception as error:
        return _load_failed(error)
    return None


def pause(awaited: Ticket | Future[Image] | None) -> None:
    """Until it has arrived, but no longer than a moment: something else may arrive first."""
    if isinstance(awaited, Future):
        wait([awaited], timeout=PAUSE_SECONDS)
    elif awaited is not None:
        with suppress(Exception):  # a load that fails is found by whoever asks its ticket
            awaited.wait_for_all(PAUSE_SECONDS)
    else:
        time.sleep(PAUSE_SECONDS)


def _take_image(request: Request) -> None:
    if request.fetched is None or not request.fetched.done():
        return
    try:
        request.image = request.fetched.result()
    except Exception as error:
        request.fail(f"its adapter can't be read: {error}")
    request.fetched = None


def _load_failed(error: Exception) -> str:
    return f"its adapter can't be loaded: {error}"
