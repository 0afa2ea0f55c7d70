# SPDX-License-Identifier: Apache-2.0
"""A report on the terminal."""

from __future__ import annotations

import sys

from results import Report, Result
from rich.console import Console
from rich.table import Table


def print_report(report: Report) -> None:
    # Tables are wider than the width that rich takes where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(f"{report.machine}; commit {report.commit}, seed {report.seed}")
    for line in peak_lines(report):
        console.print(line)
    console.print(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for peer in report.absent:
        console.print(f"[yellow]{peer.name} is absent: {peer.reason}[/yellow]")
    for dtype, threads, results in report.sections():
        console.print(make_table(report, f"{dtype}, {count(threads)}", results))
    console.print(f"{report.seconds} s; other processes used {report.others_cores} cores")
    disturbed = sum(result.disturbed for result in report.results)
    if disturbed:
        total = len(report.results)
        console.print(f"* {disturbed} of {total} cases: other processes were busy, run again")


def make_table(report: Report, title: str, results: list[Result]) -> Table:
    names = report.peer_names()
    columns = ("case", "K→N", "µs", "GB/s", "read GB/s", "GFLOP/s", "of peak")
    table = Table(*columns, *(f"{name} ×" for name in names), title=title, title_justify="left")
    for peer in report.absent:
        table.add_column(peer.name)
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for n, result in enumerate(results):
        last = n + 1 == len(results) or results[n + 1].case.group != result.case.group
        ratios = (ratio(result, name) for name in names)
        absent = ("absent" for _ in report.absent)
        label, width = case_cells(result)
        rates = rate_cells(report, result)
        table.add_row(label, width, *rates, *ratios, *absent, end_section=last)
    return table


def case_cells(result: Result) -> tuple[str, str]:
    case = result.case
    return f"{case.label} *" if result.disturbed else case.label, case.width_label


def rate_cells(report: Report, result: Result) -> tuple[str, ...]:
    if result.disturbed:
        return ("-",) * 5
    peaks = report.peaks(result.case.threads)
    share, bound = result.share(peaks), result.bound(peaks)
    of_peak = "-" if share is None else f"{share:.0%}{' read' if bound == 'memory' else ''}"
    read = "-" if result.read_gb_s is None else f"{result.read_gb_s:.1f}"
    return f"{result.us:.1f}", f"{result.gb_s:.1f}", read, f"{result.gflop_s:.1f}", of_peak


def ratio(result: Result, name: str) -> str:
    if result.disturbed:
        return "-"
    return f"{result.times[name].ratio.median:.2f}" if name in result.times else "-"


def count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def peak_lines(report: Report) -> list[str]:
    """The peaks before / after the cases."""
    lines = []
    for before, after in zip(report.peaks_before, report.peaks_after, strict=True):
        bf16 = "no vdpbf16ps"
        if before.bf16_gflop_s is not None:
            bf16 = f"vdpbf16ps {before.bf16_gflop_s:.0f} / {after.bf16_gflop_s:.0f} GFLOP/s"
        lines.append(
            f"{count(before.threads)}: {bf16}, "
            f"fp32 FMA {before.fma_gflop_s:.0f} / {after.fma_gflop_s:.0f} GFLOP/s, "
            f"reads from memory {before.read_gb_s:.1f} / {after.read_gb_s:.1f} GB/s"
        )
    return lines
