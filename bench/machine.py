# SPDX-License-Identifier: Apache-2.0
"""The machine a benchmark ran on: what it is, and what it reaches in this very run."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch

from toppings import cpu

READ_BYTES = 512 << 20
GEMM_SIZE = 3136  # no power of two
_DEFAULT_L3 = 32 << 20


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    level: str
    l3_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.cpu}, {self.threads} of {self.cores} cores, {self.level}"


@dataclass(frozen=True)
class Peaks:
    """Best of several, and measured with torch: floors of what the machine can do."""

    read_gb_s: float  # torch.sum of READ_BYTES of float32
    gemm_gflop_s: float  # torch.mm, square, GEMM_SIZE, in the dtype of the run


class Load:
    """What other processes use from now on: how quiet the machine was."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._others = self._others_seconds()

    def seconds(self) -> float:
        return perf_counter() - self._start

    def others_cores(self) -> float:
        """Cores busy with other processes, on average; NaN where the system doesn't say."""
        return max(0.0, self._others_seconds() - self._others) / self.seconds()

    @staticmethod
    def _others_seconds() -> float:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return float("nan")
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        busy = user + nice + system + irq + softirq + steal
        return busy / os.sysconf("SC_CLK_TCK") - process_time()


def describe_machine() -> Machine:
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        level=cpu.level(),
        l3_bytes=_l3_bytes(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def measure_peaks(dtype: torch.dtype, repeats: int) -> Peaks:
    buffer = torch.ones(READ_BYTES // 4)
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    read = _best_seconds(buffer.sum, repeats)
    gemm = _best_seconds(lambda: torch.mm(left, right, out=out), repeats)
    return Peaks(READ_BYTES / read / 1e9, 2 * GEMM_SIZE**3 / gemm / 1e9)


def git_commit() -> str | None:
    """The commit of the working tree, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _best_seconds(run: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up, and is never the best
        start = perf_counter()
        run()
        best = min(best, perf_counter() - start)
    return best


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _l3_bytes() -> int:
    """Of cpu0's last level; 32 MiB where the system doesn't say."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) << 10
    except (OSError, ValueError):
        return _DEFAULT_L3
