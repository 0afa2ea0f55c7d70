# SPDX-License-Identifier: Apache-2.0
"""What this machine's parts need: measured, saved, and asked by planners."""

from toppings.calibration.costs import CpuCalibration, CpuPoint, check_output
from toppings.calibration.measure import DTYPES, RANKS, TOKENS, WIDTHS, calibrate_cpu

__all__ = [
    "DTYPES",
    "RANKS",
    "TOKENS",
    "WIDTHS",
    "CpuCalibration",
    "CpuPoint",
    "calibrate_cpu",
    "check_output",
]
