# SPDX-License-Identifier: Apache-2.0
"""Time between tokens of running requests, while adapters are loaded that they don't use.

Windows of a few passes, with and without loads in turn, by the same requests; the order reverses
from pair to pair, because a pass takes longer as contexts grow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from time import perf_counter

from machine import Load
from timing import Quartiles

import toppings
from loading.cases import Plan
from loading.model import Base, Server
from loading.results import Decode
from loading.rig import ROW_BYTES, Cores, Rig
from toppings._runtime import Device

RUNNING, PROMPT = 4, 32
COLD_ADAPTERS = 5
WAITING = 2  # loads begun and not ended, so that the link never rests
SETTLE_STEPS = 2


class Loads(ABC):
    """Called between passes by the thread that makes them, so that nothing competes with it."""

    @abstractmethod
    def begin(self, loading: bool) -> None:
        """A window with or without loads."""

    @abstractmethod
    def go_on(self) -> None:
        """Keeps the link busy, in a window with loads."""

    @abstractmethod
    def end(self) -> int:
        """Bytes loaded since begin(); nothing is under way any more."""


class ForNobody(Loads):
    """A loader of its own on the engine's link."""

    def __init__(self, device: Device, layers: int, layer_bytes: int, cores: Cores) -> None:
        block = layer_bytes // ROW_BYTES * ROW_BYTES
        self._rig = Rig(device, cores, layers, block, images=WAITING + 1, room=WAITING)
        self._under_way: list = []

    def begin(self, loading: bool) -> None:
        self._before = self._rig.loader.stats().bytes
        if loading:
            self.go_on()

    def go_on(self) -> None:
        for ticket in [t for t in self._under_way if t.num_arrived == self._rig.layers]:
            self._under_way.remove(ticket)
            self._rig.table.release(ticket.slot)
        while len(self._under_way) < WAITING:
            self._under_way.append(self._rig.loader.load(self._rig.acquire(), "prefetch"))

    def end(self) -> int:
        loaded = self._rig.loader.stats().bytes - self._before
        for ticket in self._under_way:
            ticket.wait_for_all()
            self._rig.table.release(ticket.slot)
        self._under_way.clear()
        return loaded


class ForQueued(Loads):
    """Requests that wait behind the running ones. Without loads they are for the base model."""

    def __init__(self, server: Server, prompt: list[int], adapter_bytes: int) -> None:
        self._engine, self._prompt, self._adapter_bytes = server.engine, prompt, adapter_bytes
        self._names = cycle([f"{RUNNING + number}" for number in range(COLD_ADAPTERS)])
        self._queued: list[toppings.Request] = []

    def begin(self, loading: bool) -> None:
        self._before = self._last = self._engine.stats().loaded_bytes
        self._queued = [self._submit(loading) for _ in range(WAITING)]

    def go_on(self) -> None:
        loaded = self._engine.stats().loaded_bytes
        if loaded - self._last >= self._adapter_bytes:  # the older one's
            self._last += self._adapter_bytes
            self._engine.abort(self._queued.pop(0))
            self._queued.append(self._submit(True))

    def end(self) -> int:
        loaded = self._engine.stats().loaded_bytes - self._before
        for request in self._queued:
            self._engine.abort(request)
        return loaded

    def _submit(self, loading: bool) -> toppings.Request:
        name = next(self._names) if loading else None
        return self._engine.submit(self._prompt, toppings.SamplingParams(max_tokens=1), name)


def measure_decode(
    base: Base, device: Device, rank: int, for_whom: str, plan: Plan, cores: Cores
) -> Decode:
    """for_whom: "nobody" or "queued requests"."""
    server = Server(
        *(base, "layerwise", device, cores, rank, RUNNING + COLD_ADAPTERS, RUNNING + WAITING),
        max_running=RUNNING,
    )
    prompt = base.prompt(PROMPT)
    layer_bytes = base.layer_bytes(rank)
    try:
        if for_whom == "nobody":
            loads: Loads = ForNobody(device, base.layers, layer_bytes, cores)
        else:
            loads = ForQueued(server, prompt, base.layers * layer_bytes)
        run_pair(server, prompt, loads, False, plan.decode_steps)  # warms up
        load = Load()
        pairs = [
            run_pair(server, prompt, loads, number % 2 == 1, plan.decode_steps)
            for number in range(plan.decode_windows)
        ]
        others = load.others_cores()
    finally:
        server.close()
    quiet, loading = ([ms for pair in pairs for ms in pair[on].ms] for on in (False, True))
    loaded = sum(pair[True].loaded for pair in pairs)
    if loaded == 0:
        raise RuntimeError("decode: expected loads in every other window, got none")
    return Decode(
        rounds=len(pairs),
        others_cores=round(others, 2),
        device=device.name,
        emulated="emulated" in device.name,
        model=base.name,
        rank=rank,
        loads_for=for_whom,
        running=RUNNING,
        loaded_gb_s=loaded / sum(pair[True].seconds for pair in pairs) / 1e9,
        quiet_ms=Quartiles.of(quiet),
        loading_ms=Quartiles.of(loading),
        ratio=Quartiles.of([median(pair[True].ms) / median(pair[False].ms) for pair in pairs]),
        quiet_p99_ms=quantiles(quiet, n=100, method="inclusive")[98],
        loading_p99_ms=quantiles(loading, n=100, method="inclusive")[98],
    )


@dataclass(frozen=True)
class Window:
    ms: list[float]  # between tokens of each request, for all get one in every pass
    seconds: float
    loaded: int


def run_pair(
    server: Server, prompt: list[int], loads: Loads, loading_first: bool, steps: int
) -> dict[bool, Window]:
    """By whether there were loads."""
    params = toppings.SamplingParams(max_tokens=4 * (steps + SETTLE_STEPS), ignore_eos=True)
    requests = [server.engine.submit(prompt, params, f"{n}") for n in range(RUNNING)]
    while len(server.engine.step()) < RUNNING:
        pass
    windows = {}
    for loading in (loading_first, not loading_first):
        windows[loading] = run_window(server, loads, loading, steps)
    for request in requests:
        server.engine.abort(request)
    return windows


def run_window(server: Server, loads: Loads, loading: bool, steps: int) -> Window:
    loads.begin(loading)
    start = perf_counter()
    times = []
    for _ in range(SETTLE_STEPS + steps + 1):
        if loading:
            loads.go_on()
        if len(server.engine.step()) != RUNNING:
            raise RuntimeError(f"decode: expected a token for each of {RUNNING} requests")
        times.append(perf_counter())
    loaded = loads.end()
    between = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
    return Window(between[SETTLE_STEPS:], times[-1] - start, loaded)
