# SPDX-License-Identifier: Apache-2.0
"""A load layer by layer beside one copy of the same bytes, and how soon its first layer is there.

The one copy knows nothing of the loader, so that no overhead is on both sides: the time that an
emulated link takes by its definition, elsewhere a plain copy in the same rounds. An adapter with a
single layer, through the loader, is there to compare.
"""

from __future__ import annotations

from machine import Load
from timing import Quartiles

from loading.cases import Link, Plan
from loading.plain_copy import plain_copy
from loading.results import DRIVER_COPY, LINK_TIME, MEMCPY, Bandwidth
from loading.rig import Cores, Rig, open_device
from loading.rounds import paired_rounds

LAYERS, ONE, COPY = "layers", "one", "copy"


def measure_bandwidth(kind: str, link: Link, block: int, plan: Plan, cores: Cores) -> Bandwidth:
    layers = plan.layers(block)
    device = open_device(kind, link, cores)
    emulated = link.bytes_per_second is not None
    rig, whole = Rig(device, cores, layers, block), Rig(device, cores, 1, layers * block)
    jobs = {LAYERS: rig.load, ONE: whole.load}
    if not emulated:
        jobs[COPY] = plain_copy(kind, rig.bytes, cores)
    load = Load()
    times = paired_rounds(jobs, plan.rounds, plan.seconds)
    others = load.others_cores()
    layered = times[LAYERS]
    totals = [run.total for run in layered]
    ones = [run.total for run in times[ONE]]
    if emulated:
        baseline = LINK_TIME
        copies = [link.seconds(rig.bytes)] * len(layered)
        own = [link.seconds(block)] * len(layered)
    else:
        baseline = DRIVER_COPY if kind == "cuda" else MEMCPY
        copies = [run.total for run in times[COPY]]
        own = [run.transfer for run in layered]
    return Bandwidth(
        device=device.name,
        emulated=emulated,
        latency_us=link.latency_seconds * 1e6,
        block_bytes=block,
        layers=layers,
        rounds=len(layered),
        others_cores=round(others, 2),
        layers_us=micros(totals),
        baseline=baseline,
        copy_us=micros(copies),
        share=quotients(copies, totals),
        one_us=micros(ones),
        one_share=quotients(ones, totals),
        first_us=micros([run.first for run in layered]),
        own_us=micros(own),
        late_us=micros([run.first - seconds for run, seconds in zip(layered, own, strict=True)]),
    )


def micros(seconds: list[float]) -> Quartiles:
    return Quartiles.of([1e6 * value for value in seconds])


def quotients(numerators: list[float], denominators: list[float]) -> Quartiles:
    return Quartiles.of([n / d for n, d in zip(numerators, denominators, strict=True)])
