# SPDX-License-Identifier: Apache-2.0
"""One case: every implementation checked against float64, then timed, eagerly and in graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter

import torch
from timing import Timing, summarize

from gpu.cases import Case
from gpu.clock import Clock
from gpu.inputs import Inputs
from gpu.model import work_of
from gpu.peers import Absent, Peer
from gpu.peers.interface import Run, one_line
from gpu.results import BASELINE, MODES, Result
from toppings import reference

TOLERANCE = 5e-3  # of the norm, bf16, as in tests/ops
PEER_SLACK = 4  # peers round v and the delta to bf16
MIN_ROUNDS, MAX_ROUNDS = 7, 200
SLOW, MOST_SKIPPED = 8, 8  # so many times slower than the fastest sits out all but one of so many


def measure(
    case: Case, peers: list[Peer], clock: Clock, device: torch.device, seed: int, seconds: float
) -> Result:
    """seconds: of each mode. An implementation that fails is left out, and why is kept."""
    inputs = Inputs(case, device, seed)
    runs, errors, failures = prepare(inputs, peers)
    times: dict[str, dict[str, Timing]] = {}
    gc.collect()
    for mode in MODES:
        calls = inputs.calls if mode == "graph" else 1
        jobs: dict[str, Callable[[], object]] = {}
        for name, run in runs.items():
            try:
                jobs[name] = (
                    captured(run, calls, clock) if mode == "graph" else in_turn(run, inputs)
                )
            except Exception as error:  # a graph that can't be captured
                failures.append(Absent(f"{name}, {mode}", one_line(error)))
        if BASELINE in jobs:
            rounds = time_rounds(jobs, clock, seconds)
            per_call = {
                name: {number: us / calls for number, us in of_rounds.items()}
                for name, of_rounds in rounds.items()
            }
            times[mode] = summarize(per_call, BASELINE)
        jobs.clear()  # graphs hold memory
    return Result(case, inputs.calls, work_of(case), errors, failures, times)


def in_turn(run: Run, inputs: Inputs) -> Callable[[], object]:
    """Every call takes the next weights."""
    number = 0

    def call() -> None:
        nonlocal number
        run(number)
        number = (number + 1) % inputs.calls

    return call


def captured(run: Run, calls: int, clock: Clock) -> Callable[[], object]:
    """One graph of all calls, each with weights of its own."""

    def call() -> None:
        for number in range(calls):
            run(number)

    return clock.capture(call)


def prepare(
    inputs: Inputs, peers: list[Peer]
) -> tuple[dict[str, Run], dict[str, float], list[Absent]]:
    """What runs and is right; its error on the last call; what failed."""
    call = inputs.calls - 1
    arguments = inputs.operator_arguments(call)
    inputs.reset(call)
    want = reference.lora_forward(*arguments)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    failures: list[Absent] = []
    for peer in peers:
        if not peer.supports(inputs.case):
            continue
        try:
            run = peer.prepare(inputs)
            run(0)  # compiles and allocates
            inputs.reset(call)
            run(call)
            got = inputs.y_sorted[call] if peer.sorted else inputs.y[call]
            expected = want[inputs.order] if peer.sorted else want
            error = float((got.double() - expected).norm() / expected.norm())
        except Exception as failure:  # in another project's code
            failures.append(Absent.because(peer.name, failure))
            continue
        bound = TOLERANCE * (1 if peer.name == BASELINE else PEER_SLACK)
        if not error <= bound:  # NaN fails too
            failures.append(Absent(peer.name, f"error {error:.2g}, expected up to {bound:g}"))
            continue
        runs[peer.name], errors[peer.name] = run, float(f"{error:.2g}")
    return runs, errors, failures


def time_rounds(
    jobs: dict[str, Callable[[], object]], clock: Clock, seconds: float
) -> dict[str, dict[int, float]]:
    """µs of every job, by round; the order reverses from round to round, the baseline is in all."""
    first = {name: clock.time(job) for name, job in jobs.items()}
    every = {
        name: 1 if name == BASELINE else skipped(us / min(first.values()))
        for name, us in first.items()
    }
    times: dict[str, dict[int, float]] = {name: {} for name in jobs}
    order = list(jobs)
    end = perf_counter() + seconds
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and perf_counter() > end:
            break
        for name in order:
            if number % every[name] == 0 or number < 2:
                times[name][number] = clock.time(jobs[name])
        order.reverse()
    return times


def skipped(ratio: float) -> int:
    return max(1, min(int(ratio / SLOW), MOST_SKIPPED))
