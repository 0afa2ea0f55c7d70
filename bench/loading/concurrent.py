# SPDX-License-Identifier: Apache-2.0
"""Loads that share the link: how much of it they use, how evenly, and how an urgent one fares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep

from machine import Load
from timing import Quartiles

from loading.cases import Link, Plan
from loading.results import Concurrent
from loading.rig import Cores, Rig, open_device
from loading.rounds import paired_rounds

POLL_SECONDS = 2e-5


@dataclass(frozen=True)
class Together:
    first_end: float  # seconds from the first load() on
    last_end: float
    urgent: float  # of one urgent load begun behind all others but itself


def measure_concurrent(kind: str, link: Link, plan: Plan, cores: Cores) -> list[Concurrent]:
    device = open_device(kind, link, cores)
    most = max(plan.concurrent)
    rig = Rig(
        *(device, cores, plan.concurrent_layers, plan.concurrent_block),
        images=2 * most,
        room=most,
    )
    load = Load()
    jobs = {f"{count}": partial(run_together, rig, count) for count in plan.concurrent}
    rounds = paired_rounds(jobs, plan.rounds, plan.seconds)
    others = load.others_cores()
    alone = rounds[f"{plan.concurrent[0]}"]
    results = []
    for count in plan.concurrent:
        taken = rounds[f"{count}"]
        ends = [run.last_end for run in taken]
        pairs = list(zip(taken, alone, strict=True))
        results.append(
            Concurrent(
                device=device.name,
                emulated=link.bytes_per_second is not None,
                loads=count,
                bytes_each=rig.bytes,
                rounds=len(taken),
                others_cores=round(others, 2),
                gb_s=Quartiles.of([count * rig.bytes / end / 1e9 for end in ends]),
                share=Quartiles.of([count * one.last_end / run.last_end for run, one in pairs]),
                spread=Quartiles.of([1 - run.first_end / run.last_end for run in taken]),
                urgent=Quartiles.of([run.urgent / one.urgent for run, one in pairs]),
            )
        )
    return results


def run_together(rig: Rig, count: int) -> Together:
    first, last = run_equal(rig, count)
    return Together(first, last, run_urgent(rig, count))


def run_equal(rig: Rig, count: int) -> tuple[float, float]:
    """When the first and the last of equal loads ended. Nobody waits for any layer."""
    slots = [rig.acquire() for _ in range(count)]
    start = perf_counter()
    tickets = [rig.loader.load(slot) for slot in slots]
    left, ends = set(range(count)), []
    while left:
        done = {n for n in left if tickets[n].num_arrived == rig.layers}
        ends += [perf_counter() - start] * len(done)
        left -= done
        sleep(POLL_SECONDS)
    for ticket, slot in zip(tickets, slots, strict=True):
        ticket.wait_for_all()
        rig.table.release(slot)
    return min(ends), max(ends)


def run_urgent(rig: Rig, count: int) -> float:
    slots = [rig.acquire() for _ in range(count)]
    tickets = [rig.loader.load(slot, "prefetch") for slot in slots[:-1]]
    start = perf_counter()
    urgent = rig.loader.load(slots[-1], "urgent")
    urgent.wait_for_all()
    seconds = perf_counter() - start
    for ticket, slot in zip([*tickets, urgent], slots, strict=True):
        ticket.wait_for_all()
        rig.table.release(slot)
    return seconds
