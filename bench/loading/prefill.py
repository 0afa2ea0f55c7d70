# SPDX-License-Identifier: Apache-2.0
"""Time to the first token of a request whose adapter isn't there, by mode, beside one whose is."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from machine import Load
from timing import Quartiles

from loading.cases import Plan
from loading.model import Base, Server
from loading.results import Prefill
from loading.rig import Cores
from loading.rounds import paired_rounds
from toppings._runtime import Device

COLD_MODES = ("blocking", "async", "layerwise")
COLD_ADAPTERS, COLD_ROOM = 5, 2  # in turn, so that each has gone when it comes up again


def layer_compute(base: Base, rank: int, plan: Plan, cores: Cores) -> float:
    """Seconds of a layer in a warm prefill, on the host without a link."""
    server = Server(base, "cached", Device.host(), cores, rank, adapters=1, room=1)
    try:
        times = [server.first_token(base.prompt(plan.prompt), "0") for _ in range(5)]
    finally:
        server.close()
    return median(times[1:]) / base.layers


def measure_prefill(
    base: Base,
    make_device: Callable[[], Device],
    rank: int,
    ratio: float | None,
    transfer: float,
    plan: Plan,
    cores: Cores,
) -> Prefill:
    """make_device: one for each engine, so that none sees another's copies. transfer: seconds of a
    layer on its link.
    """
    prompt = base.prompt(plan.prompt)
    servers = {
        mode: Server(base, mode, make_device(), cores, rank, COLD_ADAPTERS, COLD_ROOM)
        for mode in COLD_MODES
    }
    servers["cached"] = Server(base, "cached", make_device(), cores, rank, 1, 1)

    def job(mode: str) -> Callable[[], tuple[float, float]]:
        """Of the next adapter, cold but in mode cached, and again, when it is there."""
        server = servers[mode]

        def run() -> tuple[float, float]:
            name = server.next_name()
            first = server.first_token(prompt, name)
            return first, server.first_token(prompt, name) if mode == "layerwise" else first

        return run

    try:
        load = Load()
        times = paired_rounds({mode: job(mode) for mode in servers}, plan.prefill_rounds)
        others = load.others_cores()
        stats = {mode: servers[mode].engine.stats() for mode in COLD_MODES}
    finally:
        for server in servers.values():
            server.close()
    rounds = len(times["cached"])
    for mode in COLD_MODES:
        if stats[mode].loads < rounds:
            raise RuntimeError(f"{mode}: expected {rounds} loads or more, got {stats[mode].loads}")
    device = stats["layerwise"].device
    first = {mode: [pair[0] for pair in pairs] for mode, pairs in times.items()}
    first["warm"] = [pair[1] for pair in times["layerwise"]]
    excess = {
        beside: Quartiles.of(
            [
                (cold - transfer) / warm
                for cold, warm in zip(first["layerwise"], first[beside], strict=True)
            ]
        )
        for beside in ("cached", "warm")
    }
    return Prefill(
        rounds=rounds,
        others_cores=round(others, 2),
        device=device,
        emulated="emulated" in device,
        model=base.name,
        rank=rank,
        prompt=plan.prompt,
        layers=base.layers,
        layer_bytes=base.layer_bytes(rank),
        ratio=ratio,
        transfer_ms=1e3 * transfer,
        ms={
            mode: Quartiles.of([1e3 * value for value in values]) for mode, values in first.items()
        },
        excess=excess,
    )
