# SPDX-License-Identifier: Apache-2.0
"""Two panels, of calls in graphs: how many times longer the peers take, and shares of the roofline.

Only the cases that are measured at every site, or all where there are few.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

from gpu.results import Report, Result

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the backend is chosen

MODE = "graph"
MOST = 60
STYLES = {  # colours that colour-blind readers tell apart, one shape each
    "torch loop": ("#D55E00", "o"),
    "gather + bmm": ("#CC79A7", "D"),
    "grouped_mm": ("#E69F00", "s"),
    "vLLM": ("#0072B2", "v"),
    "SGLang": ("#009E73", "P"),
}


def chosen(report: Report) -> list[Result]:
    measured = [result for result in report.results if MODE in result.times]
    if len(measured) <= MOST:
        return measured
    return [result for result in measured if result.case.site.model == "8B"][:MOST]


def save_figure(report: Report, path: Path) -> None:
    results = chosen(report)
    figure, (ratios, shares) = pyplot.subplots(
        *(1, 2),
        figsize=(13, 2 + 0.24 * len(results)),
        width_ratios=(3, 1),
        sharey=True,
        layout="constrained",
    )
    for name in report.peer_names():
        colour, marker = STYLES[name]
        points = [(result.ratio(MODE, name), n) for n, result in enumerate(results)]
        points = [(ratio, n) for ratio, n in points if ratio is not None]
        ratios.scatter(*zip(*points, strict=True) if points else ([], []), color=colour,
                       marker=marker, s=34, label=name, zorder=3)  # fmt: skip
    ratios.axvline(1, color="black", linewidth=1)
    ratios.set_xscale("log")
    ratios.set_xlabel("a peer's time over toppings'")
    ratios.set_yticks(range(len(results)), [result.case.label for result in results], fontsize=8)
    ratios.set_ylim(len(results) - 0.4, -0.6)
    ratios.grid(axis="y", color="#EEEEEE")
    if report.peer_names():
        ratios.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(STYLES), frameon=False)
    values = [100 * (result.share_of_roofline(MODE, report.peaks) or 0) for result in results]
    shares.barh(range(len(results)), values, 0.62, color="#4C72B0")
    shares.axvline(100, color="black", linewidth=1)
    shares.set_xlabel("% of the measured roofline")
    title = "One LoRA site in CUDA graphs, weights from memory, bf16"
    figure.suptitle(f"REHEARSAL, no GPU: {title}" if report.rehearsal else title, fontsize=14)
    figure.supxlabel(f"{report.device}; {report.command}, commit {report.commit}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
