# SPDX-License-Identifier: Apache-2.0
"""The generated part of "The loader" in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

from loading.results import Report
from loading.table import Table, all_tables, fact_lines

BEGIN = "<!-- written by bench/loader.py, from here -->"
END = "<!-- written by bench/loader.py, to here -->"


def write_section(report: Report, path: Path) -> None:
    """Replaces what stands between the two marks."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.name}: expected one line {BEGIN!r} and one {END!r}")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{make_section(report)}\n\n{END}{tail}")


def make_section(report: Report) -> str:
    facts = "\n".join(f"- {line}" for line in fact_lines(report))
    return "\n\n".join([facts, *map(make_table, all_tables(report))])


def make_table(table: Table) -> str:
    rule = ["---", *["--:"] * (len(table.columns) - 1)]
    lines = [row(table.columns), row(rule), *map(row, table.rows)]
    return "\n".join([f"### {table.title}", "", *lines])


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in cells)} |"
