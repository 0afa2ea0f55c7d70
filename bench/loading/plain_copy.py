# SPDX-License-Identifier: Apache-2.0
"""The same bytes without toppings: memcpy, or torch's cudaMemcpyAsync of page-locked memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import cycle
from time import perf_counter

import torch

from loading.rig import Cores, LoadTimes
from loading.rounds import on_core

SOURCES = 3  # as many as the loader's images


def plain_copy(kind: str, nbytes: int, cores: Cores) -> Callable[[], LoadTimes]:
    return _driver_copy(nbytes) if kind == "cuda" else _memcpy(nbytes, cores)


def _memcpy(nbytes: int, cores: Cores) -> Callable[[], LoadTimes]:
    """By one thread, on the core that copies for the loader."""
    target = torch.zeros(nbytes, dtype=torch.uint8)
    sources = [torch.full((nbytes,), n, dtype=torch.uint8) for n in range(SOURCES)]
    turns = cycle(sources)

    def run() -> LoadTimes:
        source = next(turns)
        with on_core(cores.link):
            start = perf_counter()
            ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
            return _whole(perf_counter() - start)

    return run


def _driver_copy(nbytes: int) -> Callable[[], LoadTimes]:
    target = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    sources = [torch.full((nbytes,), n, dtype=torch.uint8).pin_memory() for n in range(SOURCES)]
    turns = cycle(sources)
    stream = torch.cuda.Stream()

    def run() -> LoadTimes:
        source = next(turns)
        torch.cuda.synchronize()
        start = perf_counter()
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()
        return _whole(perf_counter() - start)

    return run


def _whole(seconds: float) -> LoadTimes:
    return LoadTimes(seconds, seconds, seconds)
