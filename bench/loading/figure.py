# SPDX-License-Identifier: Apache-2.0
"""Three panels: bandwidth by block size, the first layer's delay, cold prefills by mode."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from loading.bars import FIRST_FACTOR, FIRST_US, least_share
from loading.results import Bandwidth, Report, size

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402

COLOURS = ("#333333", "#0072B2", "#56B4E9", "#D55E00", "#E69F00")
MARKERS = ("o", "s", "D", "^", "v")
MODES = {"blocking": "#D55E00", "async": "#E69F00", "layerwise": "#0072B2", "warm": "#999999"}


def save_figure(report: Report, path: Path) -> None:
    figure, (share, first, prefill) = pyplot.subplots(1, 3, figsize=(17, 5.2), layout="constrained")
    draw_share(share, report)
    draw_first(first, report)
    draw_prefill(prefill, report)
    for axes in (share, first, prefill):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Loading adapters layer by layer (links of the host device are emulated)")
    figure.supxlabel(f"{report.machine}; {report.command}, commit {report.commit}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def by_device(report: Report) -> dict[str, list[Bandwidth]]:
    devices: dict[str, list[Bandwidth]] = {}
    for case in report.bandwidth:
        if not report.hides(case):
            devices.setdefault(case.device, []).append(case)
    return devices


def draw_share(axes: Axes, report: Report) -> None:
    for n, (device, cases) in enumerate(by_device(report).items()):
        blocks = [case.block_bytes for case in cases]
        axes.plot(blocks, [100 * case.share.median for case in cases], color=COLOURS[n % 5],
                  marker=MARKERS[n % 5], label=device)  # fmt: skip
        axes.fill_between(blocks, [100 * case.share.low for case in cases],
                          [100 * case.share.high for case in cases], color=COLOURS[n % 5],
                          alpha=0.15, linewidth=0)  # fmt: skip
        axes.plot(blocks, [100 * least_share(case) for case in cases], color=COLOURS[n % 5],
                  linestyle=":", linewidth=1)  # fmt: skip
    label_blocks(axes, report)
    axes.set_ylabel("bandwidth, % of one copy without the loader\n(dotted: the bar)")
    axes.set_ylim(0, 110)


def draw_first(axes: Axes, report: Report) -> None:
    for n, (device, cases) in enumerate(by_device(report).items()):
        blocks = [case.block_bytes for case in cases]
        axes.plot(blocks, [case.first_us.median for case in cases], color=COLOURS[n % 5],
                  marker=MARKERS[n % 5], label=device)  # fmt: skip
        axes.plot(blocks, [FIRST_FACTOR * case.own_us.median + FIRST_US for case in cases],
                  color=COLOURS[n % 5], linestyle=":", linewidth=1)  # fmt: skip
    label_blocks(axes, report)
    axes.set_yscale("log")
    axes.set_ylabel("µs until the first layer is usable (dotted: the bar)")


def draw_prefill(axes: Axes, report: Report) -> None:
    cases = [case for case in report.prefill if not report.hides(case)]
    places = range(len(cases))
    for n, (mode, colour) in enumerate(MODES.items()):
        times = [case.ms[mode] for case in cases]
        cached = [case.ms["cached"].median for case in cases]
        label = "layerwise, warm again" if mode == "warm" else mode
        heights = [time.median / base for time, base in zip(times, cached, strict=True)]
        axes.bar([place + 0.2 * (n - 1.5) for place in places], heights, 0.2, color=colour,
                 label=label)  # fmt: skip
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(places, [f"rank {c.rank}\n{c.measured_ratio:.2f}" for c in cases])
    axes.set_xlabel("a layer's transfer / its compute")
    axes.set_ylabel("time to the first token / that of mode cached")


def label_blocks(axes: Axes, report: Report) -> None:
    blocks = sorted({case.block_bytes for case in report.bandwidth})
    axes.set_xscale("log", base=2)
    axes.set_xticks(blocks, [size(block) for block in blocks], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("layer block")
