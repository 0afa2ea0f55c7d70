# SPDX-License-Identifier: Apache-2.0
"""Paired, alternating rounds: each times every implementation once, and the order reverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from statistics import quantiles
from time import perf_counter, perf_counter_ns
from typing import NamedTuple

MAX_ROUNDS = 1000
MIN_ROUNDS = 21
SLOW = 8  # an implementation this many times slower than the fastest sits out some rounds
RAREST = 7  # it takes part in one of so many at least


class Job(NamedTuple):
    run: Callable[[int], object]  # with a set of weights
    reset: Callable[[], object]  # before every timed call


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        return cls(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timing:
    rounds: int
    us: Quartiles
    ratio: Quartiles  # to the baseline's time in the same round


@dataclass
class _Runner:
    name: str
    job: Job
    every: int = 1  # takes part in one of so many rounds
    times: dict[int, float] = field(default_factory=dict)  # µs by round


def time_rounds(
    jobs: dict[str, Job], baseline: str, sets: list[int], seconds: float
) -> dict[str, dict[int, float]]:
    """µs of every implementation, by round; the baseline takes part in all of them.

    A call takes the next set of weights, whoever made the call before it, so a set comes up again
    only after all others. Right before a timed call its implementation makes an untimed one:
    after a slow single-threaded peer the OpenMP threads have gone to sleep, and the next to call
    would pay for waking them.
    """
    calls = cycle(sets)

    def one(runner: _Runner) -> float:
        run, reset = runner.job
        run(next(calls))
        reset()
        call = next(calls)
        start = perf_counter_ns()
        run(call)
        return (perf_counter_ns() - start) / 1e3

    runners = [_Runner(name, job) for name, job in jobs.items()]
    first = [one(runner) for runner in runners]
    for runner, us in zip(runners, first, strict=True):
        if runner.name != baseline:
            # Odd, so that it comes before and after the others in turn.
            runner.every = min(int(us / min(first) / SLOW) // 2 * 2 + 1, RAREST)
    end = perf_counter() + seconds
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and perf_counter() > end:
            break
        for runner in runners:
            if number % runner.every == 0:
                runner.times[number] = one(runner)
        runners.reverse()
    return {runner.name: runner.times for runner in runners}


def summarize(times: dict[str, dict[int, float]], baseline: str) -> dict[str, Timing]:
    """Ratios pair times of the same round."""
    summary = {}
    for name, rounds in times.items():
        ratios = [us / times[baseline][number] for number, us in rounds.items()]
        summary[name] = Timing(
            len(rounds), Quartiles.of(list(rounds.values())), Quartiles.of(ratios)
        )
    return summary
