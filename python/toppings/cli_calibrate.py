# SPDX-License-Identifier: Apache-2.0
"""``toppings calibrate``: what this machine's parts need, as JSON and as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from toppings import calibration
from toppings.calibration import CpuCalibration, calibrate_cpu, check_output
from toppings.errors import InvalidArgumentError

__all__ = ["add_arguments", "run"]

_MIN_ROUNDS = 3
_FULL = (100, 40.0)  # rounds, and seconds after which no further one starts
_QUICK = (15, 6.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu", action="store_true", help="LoRA products on one core, weights cold in the cache"
    )
    parser.add_argument("--dtype", choices=calibration.DTYPES, default=calibration.DTYPES[0])
    for name, default, meaning in (
        ("ranks", calibration.RANKS, "ranks"),
        ("widths", calibration.WIDTHS, "projection widths, K = N"),
        ("tokens", calibration.TOKENS, "tokens of a call"),
    ):
        shown = " ".join(map(str, default))
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs="+",
            default=default,
            metavar="N",
            help=f"{meaning} (default: {shown})",
        )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("toppings-calibration-cpu.json"),
        help="an older calibration there is replaced, any other file refused (default: "
        "%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples: seconds, less exact")


def run(args: argparse.Namespace) -> None:
    if not args.cpu:
        raise InvalidArgumentError(
            "calibrate: expected --cpu, the only part that can be calibrated yet, got none"
        )
    replaces = check_output(args.output)  # before the measuring, not after it
    most, seconds = _QUICK if args.quick else _FULL
    console = Console(stderr=True)
    # Shown between rounds only: a thread that refreshes the bar would disturb what is timed.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        rounds = progress.track(_rounds(most, seconds), most, description="rounds")
        result = calibrate_cpu(args.dtype, args.ranks, args.widths, args.tokens, rounds)
    result.save(args.output)
    _print_report(result)
    print(f"{'replaced' if replaces else 'saved to'} {args.output}")


def _rounds(most: int, seconds: float) -> Iterator[int]:
    """A slow machine gets fewer rounds, not a long wait."""
    start = perf_counter()
    for done in range(most):
        if done >= _MIN_ROUNDS and perf_counter() - start > seconds:
            return
        yield done


def _print_report(result: CpuCalibration) -> None:
    console = Console(highlight=False)
    console.print(
        f"{result.cpu}, {result.level}, {result.dtype}, one core, weights from a pool of "
        f"{result.pool_bytes >> 20} MiB, {result.samples} samples; "
        f"torch {result.torch}, toppings {result.toppings}"
    )
    tokens = sorted({point.tokens for point in result.points})
    table = Table("K = N", "rank", *(f"T={count}" for count in tokens))
    table.title = "thousand tokens/s per core"
    for column in table.columns:
        column.justify = "right"
    cells = {(point.k, point.rank, point.tokens): point for point in result.points}
    rows = sorted({(point.k, point.rank) for point in result.points})
    for (width, rank), following in zip(rows, [*rows[1:], None], strict=True):
        points = [cells[width, rank, count] for count in tokens]
        figures = (
            f"{point.tokens_per_second / 1e3:,.1f}{'*' if point.noisy else ' '}" for point in points
        )
        last = following is None or following[0] != width
        table.add_row(f"{width}", f"{rank}", *figures, end_section=last)
    console.print(table)
    noisy = sum(point.noisy for point in result.points)
    if noisy:
        console.print(
            f"* quartiles over 20 % of the median apart ({noisy} of {len(result.points)} points): "
            "something else was busy; run again"
        )
