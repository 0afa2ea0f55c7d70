# SPDX-License-Identifier: Apache-2.0
"""A report as plain text: toppings' times and rates, and how many times longer its peers take."""

from __future__ import annotations

from gpu.results import MODES, Report, Result

HEAD = ("µs", "GB/s", "bw", "roof")


def report_lines(report: Report) -> list[str]:
    peaks, device = report.peaks, report.device
    lines = [f"{device}; commit {report.commit}, seed {report.seed}"]
    if report.rehearsal:
        lines.append("REHEARSAL on the CPU: the times mean nothing")
    lines.append(
        f"copy {peaks.copy_gb_s:.0f} GB/s, read {peaks.read_gb_s:.0f} GB/s, "
        f"bf16 product {peaks.mm_tflop_s:.1f} TFLOP/s, "
        f"empty kernel {peaks.launch_us:.1f} µs eager, {peaks.graph_launch_us:.1f} µs in a graph"
    )
    lines.append(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    lines += [f"{peer.name} is absent: {peer.reason}" for peer in report.absent]
    for mode in MODES:
        lines += ["", f"{mode}: bw, roof: shares of the bandwidth and of the roofline; ×: peers"]
        lines += table_lines(report, mode)
    lines += ["", *failure_lines(report)]
    lines.append(f"{len(report.results)} cases in {report.seconds} s, {report.left_out} left out")
    if report.stopped:
        lines.append(f"STOPPED: {report.stopped}")
    return lines


def table_lines(report: Report, mode: str) -> list[str]:
    names = report.peer_names()
    rows = [["case", *HEAD, *(f"{name} ×" for name in names)]]
    for result in report.results:
        ratios = [number(result.ratio(mode, name), "{:.2f}") for name in names]
        rows.append([result.case.label, *rate_cells(report, result, mode), *ratios])
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(align(row, sizes)).rstrip() for row in rows]


def align(row: list[str], sizes: list[int]) -> list[str]:
    first, *rest = zip(row, sizes, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(size) for cell, size in rest)]


def rate_cells(report: Report, result: Result, mode: str) -> list[str]:
    gb_s = result.gb_s(mode)
    bandwidth = None if gb_s is None else gb_s / report.peaks.gb_s
    return [
        number(result.us(mode), "{:.1f}"),
        number(gb_s, "{:.0f}"),
        number(bandwidth, "{:.0%}"),
        number(result.share_of_roofline(mode, report.peaks), "{:.0%}"),
    ]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def failure_lines(report: Report) -> list[str]:
    """Each failure once, with the number of cases and the first of them."""
    places: dict[tuple[str, str], list[str]] = {}
    for result in report.results:
        for failure in result.failures:
            places.setdefault((failure.name, failure.reason), []).append(result.case.label)
    return [
        f"{name} failed in {len(cases)} cases ({cases[0]}): {reason}"
        for (name, reason), cases in places.items()
    ]
