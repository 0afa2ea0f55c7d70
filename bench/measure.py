# SPDX-License-Identifier: Apache-2.0
"""One case: every implementation checked against float64, then timed."""

from __future__ import annotations

import gc
from collections.abc import Callable

from cases import Case
from inputs import Inputs, Pool
from machine import Load
from peers import Peer
from peers.interface import Run
from peers.toppings_operator import operator_arguments
from results import BASELINE, READ, Result
from timing import Job, summarize, time_rounds

from toppings import reference

TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # of the norm, as in tests/ops
PEER_SLACK = 4  # peers round v and the delta to the dtype of x


def measure(
    case: Case,
    pool: Pool,
    peers: list[Peer],
    seed: int,
    seconds: float,
    read: Callable[[Inputs], Run] | None = None,
) -> Result:
    """read: prepares the plain read that joins the rounds of cold cases."""
    inputs = Inputs(case, pool, seed + 1)  # other numbers than the weights
    used = [peer for peer in peers if peer.supports(case)]
    jobs = {
        peer.name: Job(peer.prepare(inputs), inputs.reset_sorted if peer.sorted else inputs.reset)
        for peer in used
    }
    errors = check(inputs, used, jobs, seed)
    if case.cold and read is not None:
        jobs[READ] = Job(read(inputs), inputs.reset)
    gc.collect()
    gc.disable()
    load = Load()
    try:
        times = time_rounds(jobs, BASELINE, inputs.sequence, seconds)
        others_cores = load.others_cores()
    finally:
        gc.enable()
    return Result(
        case=case,
        weight_sets=inputs.sets,
        weight_bytes=inputs.weight_bytes,
        flops=inputs.flops,
        errors=errors,
        others_cores=round(others_cores, 2),
        times=summarize(times, BASELINE),
    )


def check(inputs: Inputs, peers: list[Peer], jobs: dict[str, Job], seed: int) -> dict[str, float]:
    """Every implementation's error on the last call; raises if one is wrong."""
    call = inputs.sets - 1
    arguments = operator_arguments(inputs, call)[:8]
    inputs.reset()
    want = reference.lora_forward(*arguments)
    errors = {}
    for peer in peers:
        run, reset = jobs[peer.name]
        reset()
        run(call)
        got, expected = (inputs.y_sorted, want[inputs.order]) if peer.sorted else (inputs.y, want)
        error = float((got.double() - expected).norm() / expected.norm())
        bound = TOLERANCE[inputs.case.dtype] * (1 if peer.name == BASELINE else PEER_SLACK)
        if not error <= bound:  # NaN fails too
            raise RuntimeError(
                f"{peer.name}: expected an error up to {bound:g}, got {error:g} "
                f"({inputs.case}, seed {seed})"
            )
        errors[peer.name] = float(f"{error:.2g}")
    return errors
