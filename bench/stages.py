# SPDX-License-Identifier: Apache-2.0
"""The two stages of one adapter's product apart, on one thread: their share of the machine's peak.

Shrink and expand are operators of their own and work on v [T, max_rank] in memory: copying it is
part of their times, and not of lora_forward_'s, which keeps it in the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import torch
from cases import Case
from inputs import DTYPES, Inputs, Pool
from peaks import load_library, measure_peaks
from peers.toppings_operator import operator_arguments
from rich.console import Console
from rich.table import Table
from torch.ops import toppings as ops

import toppings.ops  # noqa: F401  registers the operators

ROOT = Path(__file__).resolve().parent.parent
RANKS = (4, 8, 16, 32, 64, 128)


def measure(run: Callable[[], object], calls: int) -> float:
    """µs, the median; the first calls warm up."""
    times = []
    for _ in range(calls):
        start = perf_counter_ns()
        run()
        times.append((perf_counter_ns() - start) / 1e3)
    return median(times[calls // 10 :])


def main() -> None:
    parser = argparse.ArgumentParser(description="Shrink and expand apart, one thread.")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=4160)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peak = measure_peaks(load_library(ROOT), 1, 10).gflop_s(args.dtype)
    table = Table("rank", "shrink", "of peak", "expand", "of peak", "forward", "of peak")
    table.title = f"T={args.tokens}, K=N={args.width}, {args.dtype}, peak {peak:.0f} GFLOP/s; µs"
    for rank in RANKS:
        case = Case("prefill", args.tokens, (rank,), args.width, args.width, "identical", 1, False)
        case = replace(case, dtype=args.dtype)
        inputs = Inputs(case, Pool(case, 1, seed=1), seed=2)
        y, x, a, b, slots, scales, token_slots, widths, plan, _ = operator_arguments(inputs, 0)
        v = ops.lora_shrink(x, a, slots, token_slots, rank, plan)
        shrink = partial(ops.lora_shrink, x, a, slots, token_slots, rank, plan)
        expand = partial(ops.lora_expand_, y, v, b, slots, scales, token_slots, widths, plan)
        forward = partial(ops.lora_forward_, *operator_arguments(inputs, 0))
        cells = [f"{rank}"]
        for run, stages in ((shrink, 1), (expand, 1), (forward, 2)):
            us = measure(run, 100)
            gflop_s = stages * 2 * args.tokens * rank * args.width / us / 1e3
            cells += [f"{us:.0f}", f"{gflop_s / peak:.0%}"]
        table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
