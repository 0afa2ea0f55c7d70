# SPDX-License-Identifier: Apache-2.0
"""The instruction-set level of the CPU kernels.

The best one that the CPU has is in use unless another is set, for tests and comparisons.
"""

from __future__ import annotations

import torch

import toppings.ops  # noqa: F401  registers the operators

__all__ = ["level", "set_level", "supported_levels"]

_LEVELS = ("avx512_bf16", "avx512", "avx2", "generic")  # numbered as toppings::CpuLevel


def level() -> str:
    """The level in use."""
    return _LEVELS[torch.ops.toppings._cpu_level()]


def supported_levels() -> list[str]:
    """The levels this CPU can run, best first."""
    return [name for i, name in enumerate(_LEVELS) if torch.ops.toppings._cpu_supports(i)]


def set_level(name: str) -> None:
    """Makes every later operator call of the process use level `name`.

    Not while an operator runs. Raises ValueError for an unknown or unsupported level.
    """
    if name not in supported_levels():
        raise ValueError(f"level: expected one of {supported_levels()}, got {name!r}")
    torch.ops.toppings._set_cpu_level(_LEVELS.index(name))
