# SPDX-License-Identifier: Apache-2.0
"""Time on the device, the L2 flushed before; and on the host, for the rehearsal without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Protocol

import torch

L2_TIMES = 3  # the flush reads so many times the L2


class Clock(Protocol):
    def time(self, run: Callable[[], object]) -> float:
        """µs of one run, nothing of it in L2."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """A graph of it, as a function that replays it."""


class CudaClock:
    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.ones(L2_TIMES * l2 // 4, device=device)
        self._sink = torch.empty((), device=device)
        self._stream = torch.cuda.Stream(device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def time(self, run: Callable[[], object]) -> float:
        # Reads, because lines that a write left in L2 would be written back on the call's time.
        # The call is launched meanwhile, so up to some 50 µs of its launching are hidden.
        torch.amax(self._buffer, dim=0, out=self._sink)
        self._start.record()
        run()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) * 1e3

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        # Not on the default stream, and once before: what is compiled or allocated at the first
        # call can't be captured.
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


class HostClock:
    def time(self, run: Callable[[], object]) -> float:
        start = perf_counter_ns()
        run()
        return (perf_counter_ns() - start) / 1e3

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        return run
