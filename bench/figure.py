# SPDX-License-Identifier: Apache-2.0
"""Two panels: how many times longer the peers take, and the share of the machine's peak."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from results import Report, Result
from table import count

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402

WIDTH = 4160
STYLES = {  # colours that colour-blind readers tell apart, one shape each
    "torch loop": ("#D55E00", "o"),
    "torch addmm": ("#E69F00", "s"),
    "gather + bmm": ("#CC79A7", "D"),
    "PEFT": ("#56B4E9", "^"),
    "vLLM": ("#0072B2", "v"),
    "oneDNN": ("#009E73", "P"),
    "libxsmm": ("#333333", "X"),
}
COMPUTE, MEMORY = "#4C72B0", "#DD8452"
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def chosen(report: Report) -> list[Result]:
    """bf16 with the most threads, at one width, and the smallest call."""
    dtype, _, results = report.sections()[0]
    results = [result for result in results if not result.disturbed]
    rows = [r for r in results if r.case.width_in == r.case.width_out == WIDTH]
    small = [result for result in results if result.case.group == "smallest call"]
    if dtype != "bf16" or not rows:
        raise ValueError(f"figure: expected bf16 results of width {WIDTH} (a full run)")
    return small + rows


def save_figure(report: Report, path: Path) -> None:
    results = chosen(report)
    figure, (ratios, shares) = pyplot.subplots(
        *(1, 2),
        figsize=(13, 2 + 0.27 * len(results)),
        width_ratios=(3, 1.25),
        sharey=True,
        layout="constrained",
    )
    draw_ratios(ratios, report, results)
    draw_shares(shares, report, results)
    ratios.set_yticks(range(len(results)), [label(result) for result in results])
    ratios.set_ylim(len(results) - 0.4, -0.6)
    for axes in (ratios, shares):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        draw_groups(axes, results)
    threads = results[0].case.threads
    figure.suptitle(
        f"One LoRA call beside its peers: bf16, K = N = {WIDTH}, {count(threads)}", fontsize=14
    )
    figure.supxlabel(f"{report.machine}; {report.command}, commit {report.commit}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_ratios(axes: Axes, report: Report, results: list[Result]) -> None:
    for place, result in enumerate(results):
        medians = [result.times[name].ratio.median for name in report.peer_names()
                   if name in result.times]  # fmt: skip
        axes.plot([1, max(medians)], [place] * 2, color="#DDDDDD", linewidth=1.2, zorder=1)
    for name in report.peer_names():
        colour, marker = STYLES[name]
        places = [n for n, result in enumerate(results) if name in result.times]
        timings = [results[n].times[name].ratio for n in places]
        axes.scatter([ratio.median for ratio in timings], places, color=colour, marker=marker,
                     s=38, label=name, zorder=3, edgecolors="white", linewidths=0.4)  # fmt: skip
        axes.hlines(places, [ratio.low for ratio in timings], [ratio.high for ratio in timings],
                    color=colour, linewidth=1.2, alpha=0.5, zorder=2)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.axvspan(0.01, 1, color="#F3F3F3", zorder=0)
    axes.set_xscale("log")
    shown = [result.times[name].ratio for result in results for name in report.peer_names()
             if name in result.times]  # fmt: skip
    low, high = min(ratio.low for ratio in shown), max(ratio.high for ratio in shown)
    axes.set_xlim(min(0.8, low * 0.9), high * 1.15)
    ticks = [tick for tick in TICKS if low * 0.9 <= tick <= high * 1.15]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("a peer's time over toppings' (grey: the peer is faster; lines: quartiles)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(STYLES), frameon=False,
                handletextpad=0.2, columnspacing=1.4)  # fmt: skip


def draw_shares(axes: Axes, report: Report, results: list[Result]) -> None:
    peaks = report.peaks(results[0].case.threads)
    for bound, colour, text in (
        ("compute", COMPUTE, "of vdpbf16ps" if peaks.bf16_gflop_s else "of fp32 FMA"),
        ("memory", MEMORY, "of a plain read's speed"),
    ):
        shares = [(n, result.share(peaks)) for n, result in enumerate(results)
                  if result.bound(peaks) == bound]  # fmt: skip
        places = [n for n, share in shares if share is not None]
        values = [100 * share for _, share in shares if share is not None]
        axes.barh(places, values, 0.62, color=colour, label=text)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.0f}", (value, place), (-4, 0), textcoords="offset points",
                          ha="right", va="center", color="white", fontsize=8)  # fmt: skip
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, 112)
    axes.set_xlabel("% of the peak measured in this run")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False,
                handletextpad=0.4, columnspacing=1.2)  # fmt: skip


def draw_groups(axes: Axes, results: list[Result]) -> None:
    for n in range(1, len(results)):
        if results[n].case.group != results[n - 1].case.group:
            axes.axhline(n - 0.5, color="#BBBBBB", linewidth=0.6)


def label(result: Result) -> str:
    case = result.case
    width = "" if case.width_in == WIDTH else f", {case.width_label}"
    return f"{case.label}{width}"
