# SPDX-License-Identifier: Apache-2.0
"""Everything that the calls of a case read and write, on the device.

Call n has adapters, x and y of its own, so that inside a graph no call finds anything of another's
in the caches.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from gpu.cases import Case
from gpu.model import tokens_per_adapter, work_of

DTYPE = torch.bfloat16
ALIGNMENT = 64  # numbers
SETS_BYTES = 1 << 30
MAX_CALLS = 8


def call_count(case: Case) -> int:
    return max(2, min(MAX_CALLS, SETS_BYTES // work_of(case).bytes))


class Inputs:
    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        self.calls = call_count(case)
        host = torch.Generator().manual_seed(seed)
        self._random = torch.Generator(device).manual_seed(seed)
        tokens, width = case.tokens, sum(case.site.widths)
        local = torch.arange(tokens) * case.adapters // tokens
        if case.phase == "decode":
            local = local[torch.randperm(tokens, generator=host)]
        self.order = torch.argsort(local, stable=True).to(device)
        self.token_slots = local.int().to(device)  # counted within a call
        self.lengths = tokens_per_adapter(case)
        signs = 2 * torch.randint(0, 2, (self.calls, case.adapters), generator=host) - 1
        sizes = 0.5 + torch.rand(self.calls, case.adapters, generator=host)
        self.scales = (signs * sizes).bfloat16().float().to(device)  # exact in both
        self.x = self._randn(self.calls, tokens, case.site.width_in)
        self.y_start = self._randn(self.calls, tokens, width)
        self.y = self.y_start.clone()
        self.starts, size = self._layout()
        self.arena = self._randn(size)
        self._scale_weights()

    def _randn(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=DTYPE, device=self.device).normal_(generator=self._random)

    def _layout(self) -> tuple[Tensor, int]:
        """Where A and B start, and the rank: [calls, S, adapters, 3]; the arena's size."""
        site, rows, end = self.case.site, [], 0
        for _ in range(self.calls):
            for rank in self.case.adapter_ranks:
                for width in site.widths:
                    b = _aligned(end + rank * site.width_in)
                    rows.append((end, b, rank))
                    end = _aligned(b + rank * width)
        shape = (self.calls, self.case.adapters, len(site.widths), 3)
        return torch.tensor(rows).view(shape).transpose(1, 2).contiguous(), end

    def _scale_weights(self) -> None:
        """So that a delta is as large as y."""
        for call in range(self.calls):
            for adapter, rank in enumerate(self.case.adapter_ranks):
                for s in range(len(self.case.site.widths)):
                    self.a(call, s, adapter).mul_(self.case.site.width_in**-0.5)
                    self.b(call, s, adapter).mul_(rank**-0.5)

    def a(self, call: int, s: int, adapter: int) -> Tensor:
        """[r, K]"""
        start, _, rank = self.starts[call, s, adapter].tolist()
        return self.arena[start:][: rank * self.case.site.width_in].view(rank, -1)

    def b(self, call: int, s: int, adapter: int) -> Tensor:
        """[r, N_s]"""
        _, start, rank = self.starts[call, s, adapter].tolist()
        return self.arena[start:][: rank * self.case.site.widths[s]].view(rank, -1)

    def operator_arguments(self, call: int) -> tuple:
        """Of toppings' operators and of the reference, up to the widths."""
        slots = self.starts[call].to(self.device)
        scales = self.scales[call].expand(len(self.case.site.widths), -1).contiguous()
        weights = (self.arena, self.arena, slots, scales, self.token_slots)
        return (self.y[call], self.x[call], *weights, list(self.case.site.widths))

    @property
    def max_rank(self) -> int:
        return max(self.case.adapter_ranks)

    @property
    def slices(self) -> list[slice]:
        """The columns of y that belong to each projection."""
        slices, start = [], 0
        for width in self.case.site.widths:
            slices.append(slice(start, start + width))
            start += width
        return slices

    @cached_property
    def x_sorted(self) -> Tensor:
        """Sorted by adapter, for implementations that would have to gather their rows."""
        return self.x[:, self.order]

    @cached_property
    def y_sorted(self) -> Tensor:
        return self.y_start[:, self.order]

    def reset(self, call: int) -> None:
        self.y[call].copy_(self.y_start[call])
        self.y_sorted[call].copy_(self.y_start[call][self.order])

    @cached_property
    def stacked_a(self) -> list[Tensor]:
        """For each projection [calls, adapters, max r, K], zero above an adapter's own rank."""
        return [self._stack(s, self.a, self.case.site.width_in) for s in self._projections()]

    @cached_property
    def stacked_b(self) -> list[Tensor]:
        """[calls, adapters, max r, N_s]"""
        return [self._stack(s, self.b, self.case.site.widths[s]) for s in self._projections()]

    def _projections(self) -> range:
        return range(len(self.case.site.widths))

    def _stack(self, s: int, block, width: int) -> Tensor:
        shape = (self.calls, self.case.adapters, self.max_rank, width)
        stacked = torch.zeros(shape, dtype=DTYPE, device=self.device)
        for call in range(self.calls):
            for adapter, rank in enumerate(self.case.adapter_ranks):
                stacked[call, adapter, :rank] = block(call, s, adapter)
        return stacked


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGNMENT) * ALIGNMENT
