# SPDX-License-Identifier: Apache-2.0
"""Paired, alternating rounds of jobs that time themselves."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")
MAX_ROUNDS = 1000


def paired_rounds(
    jobs: dict[str, Callable[[], T]], least: int, seconds: float = 0
) -> dict[str, list[T]]:
    """What each job returned in every round, once it has warmed up; the order reverses from round
    to round.
    """
    for job in jobs.values():
        job()
    order = list(jobs.items())
    results: dict[str, list[T]] = {name: [] for name in jobs}
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + seconds
        for number in range(MAX_ROUNDS):
            if number >= least and perf_counter() > end:
                break
            for name, job in order:
                results[name].append(job())
            order.reverse()
    finally:
        gc.enable()
    return results


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """The calling thread, and those it starts, which stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
