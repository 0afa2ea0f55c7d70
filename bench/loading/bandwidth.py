# SPDX-License-Identifier: Apache-2.0
"""A load layer by layer beside one copy of the same bytes, and how soon its first layer is there.

Both go through the same loader; the one copy is an adapter with a single layer. Where there is no
emulated link, a plain copy of the same bytes joins the rounds.
"""

from __future__ import annotations

from machine import Load
from timing import Quartiles

from loading.cases import Link, Plan
from loading.plain_copy import plain_copy
from loading.results import Bandwidth
from loading.rig import Cores, Rig, open_device
from loading.rounds import paired_rounds

LAYERS, ONE, PLAIN = "layers", "one", "plain"


def measure_bandwidth(kind: str, link: Link, block: int, plan: Plan, cores: Cores) -> Bandwidth:
    layers = plan.layers(block)
    device = open_device(kind, link, cores)
    rig, whole = Rig(device, cores, layers, block), Rig(device, cores, 1, layers * block)
    jobs = {LAYERS: rig.load, ONE: whole.load}
    if link.bytes_per_second is None:
        jobs[PLAIN] = plain_copy(kind, rig.bytes, cores)
    load = Load()
    times = paired_rounds(jobs, plan.rounds, plan.seconds)
    others = load.others_cores()
    pairs = list(zip(times[LAYERS], times[ONE], strict=True))
    if link.bytes_per_second is None:
        own = [layered.transfer for layered in times[LAYERS]]
    else:
        own = [link.latency_seconds + block / link.bytes_per_second] * len(pairs)
    return Bandwidth(
        device=device.name,
        emulated=link.bytes_per_second is not None,
        latency_us=link.latency_seconds * 1e6,
        block_bytes=block,
        layers=layers,
        rounds=len(pairs),
        others_cores=round(others, 2),
        layers_us=micros([layered.total for layered in times[LAYERS]]),
        one_us=micros([one.total for one in times[ONE]]),
        plain_us=micros([plain.total for plain in times[PLAIN]]) if PLAIN in times else None,
        share=Quartiles.of([one.total / layered.total for layered, one in pairs]),
        plain_share=Quartiles.of(
            [
                plain.total / layered.total
                for layered, plain in zip(times[LAYERS], times[PLAIN], strict=True)
            ]
        )
        if PLAIN in times
        else None,
        first_us=micros([layered.first for layered in times[LAYERS]]),
        own_us=micros(own),
        late_us=micros(
            [layered.first - seconds for layered, seconds in zip(times[LAYERS], own, strict=True)]
        ),
    )


def micros(seconds: list[float]) -> Quartiles:
    return Quartiles.of([1e6 * value for value in seconds])
