# SPDX-License-Identifier: Apache-2.0
"""The generated section of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

from results import LIBRARIES, TORCH, Report, Result
from table import case_cells, count, peak_lines, rate_cells, ratio
from timing import Timing

BEGIN = "<!-- written by bench/ops.py, from here -->"
END = "<!-- written by bench/ops.py, to here -->"


def write_section(report: Report, path: Path) -> None:
    """Replaces what stands between the two marks."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.name}: expected one line {BEGIN!r} and one {END!r}")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{make_section(report)}\n\n{END}{tail}")


def make_section(report: Report) -> str:
    blocks = [facts(report)]
    for dtype, threads, results in report.sections():
        blocks.append(f"### {dtype}, {count(threads)}\n\n{make_table(report, results)}")
    return "\n\n".join(blocks)


def facts(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    disturbed = sum(result.disturbed for result in report.results)
    lines = [
        f"- Machine: {report.machine}",
        f"- `{report.command}`, {report.seconds:.0f} s, seed {report.seed}, commit "
        f"`{report.commit}`",
        f"- {versions}",
        *(f"- {peer.name} is absent" for peer in report.absent),
        f"- Other processes used {report.others_cores} cores; {disturbed} of "
        f"{len(report.results)} cases were disturbed (`*`)",
        "- Peaks, before / after the cases:",
        *(f"  - {line}" for line in peak_lines(report)),
    ]
    return "\n".join(lines)


def make_table(report: Report, results: list[Result]) -> str:
    names = report.peer_names()
    columns = ["case", "K→N", "µs", "GB/s", "read GB/s", "GFLOP/s", "of peak", "best of torch ×"]
    columns += ["best of oneDNN, libxsmm ×", *(f"{name} ×" for name in names)]
    columns += [peer.name for peer in report.absent]
    lines = [row(columns), row(["---", "---", *["--:"] * (len(columns) - 2)])]
    for result in results:
        fastest = [result.fastest(group) for group in (TORCH, LIBRARIES)]
        best = ["-" if result.disturbed else with_quartiles(timing) for timing in fastest]
        ratios = [ratio(result, name) for name in names]
        absent = ["absent"] * len(report.absent)
        cells = [*case_cells(result), *rate_cells(report, result), *best, *ratios, *absent]
        lines.append(
            row([cell.replace("*", "\\*") if n == 0 else cell for n, cell in enumerate(cells)])
        )
    return "\n".join(lines)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_quartiles(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return f"**{timing.ratio.median:.2f}** ({timing.ratio.low:.2f}–{timing.ratio.high:.2f})"
