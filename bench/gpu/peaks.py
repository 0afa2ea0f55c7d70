# SPDX-License-Identifier: Apache-2.0
"""What the card reaches in this very run: a copy, a read, a large product, an empty kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu.clock import Clock
from gpu.inputs import MAX_CALLS


@dataclass(frozen=True)
class Peaks:
    """The best of several runs."""

    copy_gb_s: float  # read and written
    read_gb_s: float
    mm_tflop_s: float  # bf16
    launch_us: float  # of a kernel that does next to nothing
    graph_launch_us: float  # the same in a graph, of as many as a case of one token has calls

    @property
    def gb_s(self) -> float:
        """What shares of the bandwidth are of."""
        return max(self.copy_gb_s, self.read_gb_s)

    def best(self, other: Peaks) -> Peaks:
        return Peaks(
            max(self.copy_gb_s, other.copy_gb_s),
            max(self.read_gb_s, other.read_gb_s),
            max(self.mm_tflop_s, other.mm_tflop_s),
            min(self.launch_us, other.launch_us),
            min(self.graph_launch_us, other.graph_launch_us),
        )


def measure_peaks(
    clock: Clock, device: torch.device, megabytes: int = 1024, size: int = 8192, repeats: int = 20
) -> Peaks:
    count = (megabytes << 20) // 4
    source, target = (torch.ones(count, device=device) for _ in range(2))
    sink = torch.empty((), device=device)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)

    def best(run: Callable[[], object]) -> float:
        run()
        return min(clock.time(run) for _ in range(repeats))

    one = torch.zeros(1, device=device)

    def add() -> None:
        one.add_(1)

    def add_often() -> None:
        for _ in range(MAX_CALLS):
            add()

    copy = best(lambda: target.copy_(source))
    read = best(lambda: torch.amax(source, dim=0, out=sink))
    mm = best(lambda: torch.mm(a, b, out=product))
    read_bytes = 4 * count
    return Peaks(
        copy_gb_s=2 * read_bytes / copy / 1e3,
        read_gb_s=read_bytes / read / 1e3,
        mm_tflop_s=2 * size**3 / mm / 1e6,
        launch_us=best(add),
        graph_launch_us=best(clock.capture(add_often)) / MAX_CALLS,
    )
