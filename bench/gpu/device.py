# SPDX-License-Identifier: Apache-2.0
"""The card a benchmark ran on."""

from __future__ import annotations

import platform
import subprocess

import torch

from gpu.clock import Clock, CudaClock, HostClock
from gpu.results import Device


def open_device(rehearse: bool) -> tuple[torch.device, Clock]:
    if rehearse:
        return torch.device("cpu"), HostClock()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False; --rehearse needs none")
    device = torch.device("cuda", torch.cuda.current_device())
    return device, CudaClock(device)


def describe(device: torch.device) -> Device:
    host = platform.machine()
    if device.type == "cpu":
        return Device("no GPU", "0", 0, 0, 0, None, torch.version.cuda, host)
    card = torch.cuda.get_device_properties(device)
    capability = f"{card.major}{card.minor}"
    sizes = (card.multi_processor_count, card.L2_cache_size, card.total_memory)
    return Device(card.name, capability, *sizes, driver_version(), torch.version.cuda, host)


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.split("\n", 1)[0].strip()
