# SPDX-License-Identifier: Apache-2.0
"""What the system says of this machine's CPU."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["cpu_model", "l3_bytes"]

_DEFAULT_L3 = 32 << 20


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def l3_bytes() -> int:
    """Of cpu0's last level; 32 MiB where the system doesn't say."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) << 10
    except (OSError, ValueError):
        return _DEFAULT_L3
