# SPDX-License-Identifier: Apache-2.0
"""The report's tables, as rows of cells: on the terminal and in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from timing import Quartiles

from loading.bars import all_bars, least_share
from loading.results import Bandwidth, Case, Report, size


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


def all_tables(report: Report) -> list[Table]:
    tables = [bars_table(report)]
    for device, cases in groupby(report.bandwidth, key=lambda case: case.device):
        tables.append(bandwidth_table(report, device, list(cases)))
    if report.overhead:
        tables.append(
            make_table(
                report,
                "Host work per layer, on a device whose calls cost nothing",
                {
                    "layers": lambda c: f"{c.layers}, awaited {c.waits}{mark(c)}",
                    "CPU time µs": lambda c: shown(c.cpu_us, 2),
                    "wall µs": lambda c: shown(c.wall_us, 2),
                },
                report.overhead,
            )
        )
    if report.concurrent:
        tables.append(
            make_table(
                report,
                "Concurrent loads",
                {
                    "loads": lambda c: f"{c.loads} of {size(c.bytes_each)}, {c.device}{mark(c)}",
                    "GB/s": lambda c: shown(c.gb_s, 2),
                    "of one alone": lambda c: f"{c.share.median:.1%}",
                    "first to end, before the last": lambda c: f"{c.spread.median:.1%}",
                    "an urgent one ×": lambda c: shown(c.urgent, 2),
                },
                report.concurrent,
            )
        )
    if report.prefill:
        tables.append(prefill_table(report))
    if report.decode:
        tables.append(
            make_table(
                report,
                f"Time between tokens of {report.decode[0].running} requests during loads, ms",
                {
                    "link": lambda c: f"{c.device}{mark(c)}",
                    "loads for": lambda c: c.loads_for,
                    "loaded GB/s": lambda c: f"{c.loaded_gb_s:.2f}",
                    "quiet": lambda c: shown(c.quiet_ms, 2),
                    "loads": lambda c: shown(c.loading_ms, 2),
                    "ratio": lambda c: shown(c.ratio, 3),
                    "p99 quiet": lambda c: f"{c.quiet_p99_ms:.2f}",
                    "p99 loads": lambda c: f"{c.loading_p99_ms:.2f}",
                },
                report.decode,
            )
        )
    return tables


def bars_table(report: Report) -> Table:
    columns = ["bar", "verdict", "worst case", "value", "limit", "cases", "disturbed"]
    rows = []
    for bar in all_bars(report):
        worst = bar.worst
        cells = ["-"] * 3
        if worst is not None:
            cells = [worst.label, bar.unit(worst.value), bar.unit(worst.limit)]
        rows.append([bar.promise, bar.verdict, *cells, f"{len(bar.checks)}", f"{bar.disturbed}"])
    return Table("Bars", columns, rows)


def bandwidth_table(report: Report, device: str, cases: list[Bandwidth]) -> Table:
    columns: dict[str, Callable[[Any], str]] = {
        "layer block": lambda c: f"{size(c.block_bytes)} × {c.layers}{mark(c)}",
        "GB/s": lambda c: f"{c.gb_s:.2f}",
        f"one copy GB/s ({cases[0].baseline})": lambda c: f"{c.copy_gb_s:.2f}",
        "of it": lambda c: with_quartiles(c.share),
        "bar": lambda c: f"{least_share(c):.1%}",
        "first layer µs": lambda c: shown(c.first_us, 0),
        "its transfer": lambda c: f"{c.own_us.median:.0f}",
        "late": lambda c: shown(c.late_us, 1),
        "one copy through the loader GB/s": lambda c: f"{c.one_gb_s:.2f}",
        "of that": lambda c: with_quartiles(c.one_share),
    }
    return make_table(report, f"Layer by layer on {device}", columns, cases)


def prefill_table(report: Report) -> Table:
    case = report.prefill[0]
    modes = {"cached": "cached", "warm": "warm again"} | {
        mode: f"{mode}, cold" for mode in ("layerwise", "async", "blocking")
    }
    columns: dict[str, Callable[[Any], str]] = {
        "rank, link": lambda c: f"{c.rank}, {c.device}{mark(c)}",
        "transfer / compute": lambda c: f"{c.measured_ratio:.2f}",
        "transfer ms": lambda c: f"{c.transfer_ms:.2f}",
        **{text: (lambda c, mode=mode: shown(c.ms[mode], 1)) for mode, text in modes.items()},
        "(layerwise - transfer) / cached": lambda c: with_digits(c.excess["cached"]),
        "/ warm again": lambda c: with_digits(c.excess["warm"]),
    }
    title = f"Time to the first token, ms: {case.model}, {case.prompt} tokens, {case.layers} layers"
    return make_table(report, title, columns, report.prefill)


def make_table(
    report: Report, title: str, columns: dict[str, Callable[[Any], str]], cases: list[Any]
) -> Table:
    """A disturbed case shows no numbers, only its name."""
    rows = []
    for case in cases:
        name, *rest = columns.values()
        rows.append([name(case), *("-" if report.hides(case) else cell(case) for cell in rest)])
    return Table(title, list(columns), rows)


def mark(case: Case) -> str:
    return " *" if case.disturbed else ""


def shown(quartiles: Quartiles, digits: int) -> str:
    low, high = f"{quartiles.low:.{digits}f}", f"{quartiles.high:.{digits}f}"
    return f"{quartiles.median:.{digits}f} ({low}–{high})"


def with_digits(quartiles: Quartiles) -> str:
    return shown(quartiles, 3)


def with_quartiles(quartiles: Quartiles) -> str:
    return f"{quartiles.median:.1%} ({quartiles.low:.0%}–{quartiles.high:.0%})"


def fact_lines(report: Report) -> list[str]:
    disturbed, total = sum(case.disturbed for case in report.cases()), len(report.cases())
    return [
        f"Machine: {report.machine}; device: {report.device}; {report.cores}",
        f"`{report.command}`, {report.seconds:.0f} s, seed {report.seed}, commit `{report.commit}`",
        f"memcpy of 32 MB by one thread: {report.memcpy_gb_s:.1f} GB/s",
        *(f"Absent: {line}" for line in report.absent),
        f"Other processes used {report.others_cores} cores; {disturbed} of {total} cases were "
        "disturbed (`*`)",
    ]


def report_text(report: Report) -> str:
    """Plain text, so that it needs nothing where it runs."""
    blocks = ["\n".join(fact_lines(report))]
    for table in all_tables(report):
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (table.columns, *table.rows)
        ]
        blocks.append("\n".join([table.title, *lines]))
    return "\n\n".join(blocks)
