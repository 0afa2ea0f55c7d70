# SPDX-License-Identifier: Apache-2.0
"""Measures what one core of this machine needs for LoRA products.

A point is one call of ``torch.ops.toppings.lora_forward_`` with one thread, one adapter and one
projection (K in, N out), T tokens, rank r::

    y[T, N] += (x[T, K] @ A[r, K].T) @ B[r, N]

Its weights are cold in the cache, as those of an adapter that has just become needed: every call
takes the next piece of a pool of three L3 caches. x and y are warm. The rounds go over all points
again and again, so that a disturbance of seconds meets a part of every point's samples, not all
samples of one; medians then leave it out, and the quartiles show what is left of it.

A sample is the mean of three calls, by the wall clock or the thread's CPU clock, whichever shows
less: the first sees other processes on the same core, the second takes 0.6 µs to read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import product
from statistics import quantiles
from time import perf_counter_ns, thread_time_ns

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import toppings.ops  # noqa: F401  registers the operators
from toppings import cpu
from toppings._runtime import Arena, version
from toppings.calibration.costs import CpuCalibration, CpuPoint, check_positive
from toppings.calibration.machine import cpu_model, l3_bytes
from toppings.errors import InvalidArgumentError

__all__ = ["DTYPES", "RANKS", "TOKENS", "WIDTHS", "calibrate_cpu"]

DTYPES = ("bfloat16", "float16", "float32")
RANKS = (8, 16, 32, 64, 128)
WIDTHS = (512, 1024, 2048, 4096, 8192)
TOKENS = (1, 16, 64, 256)

_CALLS = 3  # timed in a row, after one that is not: it brings code, x and y into the cache
_TILE = 1 << 16  # numbers; the pool's weights repeat


def calibrate_cpu(
    dtype: str = DTYPES[0],
    ranks: Sequence[int] = RANKS,
    widths: Sequence[int] = WIDTHS,
    tokens: Sequence[int] = TOKENS,
    rounds: Iterable[object] = range(100),
) -> CpuCalibration:
    """Times every combination of `tokens`, `ranks` and `widths` (K = N) on one thread.

    Each item of `rounds` gives every point one sample, so that the caller can show progress, or end
    it early by ending the iteration. A round of the default grid is 0.2 s on a core with
    AVX512-BF16. torch's number of threads is 1 meanwhile and the former one afterwards, errors
    included. The level is the one in use.

    Raises InvalidArgumentError for an unknown dtype, for sizes that are not positive or given
    twice, for sizes that need more than half of the machine's memory, for fewer than two rounds.
    """
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, sizes in (("ranks", ranks), ("widths", widths), ("tokens", tokens)):
        for size in sizes:
            check_positive(size, name)
        if not sizes or len(set(sizes)) != len(sizes):
            raise InvalidArgumentError(
                f"{name}: expected one or more, each once, got {list(sizes)}"
            )
    grid = list(product(sorted(widths), sorted(ranks), sorted(tokens)))
    samples: list[list[float]] = [[] for _ in grid]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            bench = _Bench(getattr(torch, dtype), max(ranks), max(widths), max(tokens))
            for _ in rounds:
                for sample, (width, rank, count) in zip(samples, grid, strict=True):
                    sample.append(bench.measure(count, rank, width))
    finally:
        torch.set_num_threads(threads)
    if len(samples[0]) < 2:
        raise InvalidArgumentError(f"rounds: expected at least 2, got {len(samples[0])}")
    return CpuCalibration(
        cpu=cpu_model(),
        level=cpu.level(),
        dtype=dtype,
        toppings=version(),
        torch=torch.__version__,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        pool_bytes=bench.pool_bytes,
        samples=len(samples[0]),
        points=tuple(
            _make_point(count, rank, width, sample)
            for sample, (width, rank, count) in zip(samples, grid, strict=True)
        ),
    )


class _Bench:
    """The memory that all points share."""

    def __init__(self, dtype: torch.dtype, max_rank: int, max_width: int, max_tokens: int) -> None:
        # Twice the largest adapter: its own last call must not leave the next one's weights.
        pool = max(3 * l3_bytes() // dtype.itemsize, 4 * max_rank * max_width)
        pool = -(-pool // _TILE) * _TILE
        needed = dtype.itemsize * (pool + 2 * max_tokens * max_width)
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        if needed > available:
            raise InvalidArgumentError(
                "ranks, widths, tokens: expected sizes that need at most half of the memory, "
                f"{available >> 20} MiB, got some that need {needed >> 20} MiB"
            )
        # The runtime's memory, as for adapters: its pages are huge where the system allows it.
        arena = Arena(1, pool * dtype.itemsize, str(dtype).removeprefix("torch."))
        self._pool: Tensor = from_dlpack(arena.layer(0))
        # Small, so that y stays finite in float16.
        self._pool.view(-1, _TILE).copy_(torch.randn(_TILE).mul_(0.01))
        self._x = torch.randn(max_tokens * max_width).to(dtype)
        self._y = torch.zeros(max_tokens * max_width, dtype=dtype)
        self._token_slots = torch.zeros(max_tokens, dtype=torch.int32)
        self._scales = torch.ones(1, 1)
        self._next = 0
        self._block = 64 // dtype.itemsize

    @property
    def pool_bytes(self) -> int:
        return self._pool.numel() * self._pool.element_size()

    def measure(self, tokens: int, rank: int, width: int) -> float:
        """µs of a call with weights that no call has used since the pool's last turn."""
        x, y = (v[: tokens * width].view(tokens, width) for v in (self._x, self._y))
        y.zero_()
        token_slots = self._token_slots[:tokens]
        plan = torch.ops.toppings.lora_plan(token_slots, 1)

        def call(slots: Tensor) -> None:
            torch.ops.toppings.lora_forward_(
                y, x, self._pool, self._pool, slots, self._scales, token_slots, [width], plan, rank
            )

        first, *others = (self._take(rank, width) for _ in range(1 + _CALLS))
        call(first)
        cpu_start, start = thread_time_ns(), perf_counter_ns()
        for slots in others:
            call(slots)
        wall, cpu_time = perf_counter_ns() - start, thread_time_ns() - cpu_start
        return min(wall, cpu_time) / _CALLS / 1e3

    def _take(self, rank: int, width: int) -> Tensor:
        """The next piece of the pool, as the only slot of the only projection."""
        size = -(-2 * rank * width // self._block) * self._block
        if self._next + size > len(self._pool):
            self._next = 0
        start = self._next
        self._next += size
        return torch.tensor([[[start, start + rank * width, rank]]])


def _make_point(tokens: int, rank: int, width: int, samples: list[float]) -> CpuPoint:
    low, median, high = quantiles(samples, n=4, method="inclusive")
    return CpuPoint(tokens, rank, width, width, us=median, us_low=low, us_high=high)
