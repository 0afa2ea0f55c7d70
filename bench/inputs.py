# SPDX-License-Identifier: Apache-2.0
"""Adapters in huge pages, and the tokens that use them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from cases import ADAPTERS, Case
from torch import Tensor

from toppings import _runtime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
_ALIGNMENT = 64  # elements; bytes at least
_PERIOD = 1_048_573  # prime: no two adapters repeat the same numbers in the same places


def huge(*shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of an arena, which asks for huge pages."""
    size = torch.Size(shape).numel()
    arena = _runtime.Arena(1, max(size, 1) * dtype.itemsize, _NAMES[dtype])
    return torch.from_dlpack(arena.layer(0))[:size].view(shape)


@dataclass(frozen=True)
class Adapter:
    a: Tensor  # [r, K]
    b: Tensor  # [r, N]
    a_start: int  # elements, in the pool's memory
    b_start: int
    scale: float  # exact in every dtype


class Pool:
    """Adapters one after another in one arena, A then B, as toppings keeps them."""

    def __init__(self, case: Case, count: int, seed: int) -> None:
        self.width_in, self.width_out, ranks, name = case.pool
        self.dtype = DTYPES[name]
        self.ranks = [ranks[i % len(ranks)] for i in range(count)]
        self.max_rank = max(ranks)
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
        scales = signs * (0.5 + torch.rand(count, generator=generator))
        starts, size = self._layout()
        self.memory = huge(size, dtype=self.dtype)
        noise = torch.empty(_PERIOD, dtype=self.dtype).normal_(generator=generator)
        for start in range(0, size, _PERIOD):
            part = self.memory[start : start + _PERIOD]
            part.copy_(noise[: len(part)])
        self.adapters = []
        for (a_start, b_start), rank, scale in zip(
            starts, self.ranks, scales.to(torch.bfloat16).tolist(), strict=True
        ):
            a = self.memory[a_start:][: rank * self.width_in].view(rank, self.width_in)
            b = self.memory[b_start:][: rank * self.width_out].view(rank, self.width_out)
            # Columns of B sum r terms: with these factors the delta is as large as y.
            a *= self.width_in**-0.5
            b *= rank**-0.5
            self.adapters.append(Adapter(a, b, a_start, b_start, scale))

    def _layout(self) -> tuple[list[tuple[int, int]], int]:
        starts, end = [], 0
        for rank in self.ranks:
            a_start = end
            b_start = _aligned(a_start + rank * self.width_in)
            end = _aligned(b_start + rank * self.width_out)
            starts.append((a_start, b_start))
        return starts, end

    @cached_property
    def stacked_a(self) -> Tensor:
        """[L, max r, K], zero rows above an adapter's own rank: what stacking peers use."""
        return self._stack([adapter.a for adapter in self.adapters], self.width_in)

    @cached_property
    def stacked_b(self) -> Tensor:
        """[L, max r, N]"""
        return self._stack([adapter.b for adapter in self.adapters], self.width_out)

    def _stack(self, blocks: list[Tensor], width: int) -> Tensor:
        stacked = huge(len(blocks), self.max_rank, width, dtype=self.dtype)
        for block, target in zip(blocks, stacked, strict=True):
            target[: len(block)] = block
            target[len(block) :] = 0
        return stacked


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) in sorted order use one adapter; local: counted within the call."""

    start: int
    stop: int
    local: int


class Inputs:
    """The tokens of a case. Call n uses the case's adapters from n * case.adapters on.

    y is set back to y_start before every timed call. x_sorted and y_sorted are the same tokens
    sorted by adapter, for implementations that would have to gather them otherwise.
    """

    def __init__(self, case: Case, pool: Pool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.case, self.pool = case, pool
        self.sets = len(pool.adapters) // case.adapters if case.cold else 1
        # Not one after another in memory: the prefetchers would already be at the next one.
        self.sequence = torch.randperm(self.sets, generator=generator).tolist()
        self.local = assign(case, generator)  # [T]
        self.order = torch.argsort(self.local, stable=True)
        self.segments = make_segments(self.local[self.order].tolist())
        self.x = torch.empty(case.tokens, case.width_in, dtype=pool.dtype)
        self.x.normal_(generator=generator)
        self.y_start = torch.empty(case.tokens, case.width_out, dtype=pool.dtype)
        self.y_start.normal_(generator=generator)
        self.y = self.y_start.clone()
        # The same tensors where nothing moves, so that nobody's are warmer than another's.
        moves = self.order.tolist() != list(range(case.tokens))
        self.x_sorted = self.x[self.order] if moves else self.x
        self.y_sorted_start = self.y_start[self.order] if moves else self.y_start
        self.y_sorted = self.y_sorted_start.clone() if moves else self.y

    def adapters(self, call: int) -> list[Adapter]:
        first = call * self.case.adapters
        return self.pool.adapters[first : first + self.case.adapters]

    def reset(self) -> None:
        self.y.copy_(self.y_start)

    def reset_sorted(self) -> None:
        self.y_sorted.copy_(self.y_sorted_start)

    @property
    def weight_bytes(self) -> int:
        """Of the adapters in use, at their own ranks: what has to be read from memory."""
        rows = sum(self.pool.ranks[segment.local] for segment in self.segments)
        return rows * (self.case.width_in + self.case.width_out) * self.pool.dtype.itemsize

    @property
    def flops(self) -> int:
        rows = sum(self.pool.ranks[s.local] * (s.stop - s.start) for s in self.segments)
        return 2 * rows * (self.case.width_in + self.case.width_out)


def assign(case: Case, generator: torch.Generator) -> Tensor:
    """The adapter of every token. Only `equal` and `identical` come sorted."""
    tokens, adapters = case.tokens, case.adapters
    if case.popularity == "identical":
        return torch.zeros(tokens, dtype=torch.int64)
    if case.popularity == "equal":  # runs of the same length
        return torch.arange(tokens) * adapters // tokens
    if case.popularity == "distinct":
        return torch.randperm(tokens, generator=generator)
    if case.popularity == "uniform":
        return torch.randint(adapters, (tokens,), generator=generator)
    if case.popularity == "zipf":  # adapter i with a probability of i^-1.5
        weights = torch.arange(1, adapters + 1).double() ** -1.5
        return torch.multinomial(weights, tokens, replacement=True, generator=generator)
    raise ValueError(
        f"popularity: expected identical, equal, distinct, uniform or zipf, got {case.popularity}"
    )


def make_segments(sorted_local: list[int]) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for stop in range(1, len(sorted_local) + 1):
        if stop == len(sorted_local) or sorted_local[stop] != sorted_local[start]:
            segments.append(Segment(start, stop, sorted_local[start]))
            start = stop
    return segments


def pool_count(cases: list[Case], pool_bytes: int) -> int:
    """How many adapters a pool needs for these cases: pool_bytes for cold ones, or two calls."""
    need = max(case.adapters for case in cases)
    cold = [case for case in cases if case.cold]
    if cold:
        most = max(case.adapters for case in cold)
        need = max(need, 2 * most, -(-pool_bytes // int(cold[0].adapter_bytes())))
    return -(-need // ADAPTERS) * ADAPTERS if cold else need


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT
