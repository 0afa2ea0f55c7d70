# SPDX-License-Identifier: Apache-2.0
"""The machine a benchmark ran on, and how quiet it was."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from toppings import cpu
from toppings.calibration.machine import cpu_model, l3_bytes

CODE = ("csrc", "include", "python", "bench/*.py", "bench/*.cpp", "bench/peers")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    level: str
    l3_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.cpu}, {cores}, {self.l3_bytes >> 20} MiB L3, {self.level}"


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
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        level=cpu.level(),
        l3_bytes=l3_bytes(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def git_commit(root: Path) -> str | None:
    """The commit of the working tree, with a + where code differs from it; None outside of one."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
