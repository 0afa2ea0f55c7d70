# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measured, as a table, as JSON and as a figure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import matplotlib
from machine import Machine, Peaks
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the backend is chosen

COLOURS = ("#9ecae1", "#4292c6", "#084594")
BUSY = 0.1  # cores used by other processes from which a case counts as disturbed


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Timing:
    rounds: int
    us: Quartiles
    ratio: Quartiles  # to the baseline's time in the same round


@dataclass(frozen=True)
class Result:
    case: str
    width: int
    tokens: int
    ranks: list[int]
    seed: int
    weight_sets: int
    bytes: int
    flops: int
    errors: dict[str, float]
    others_cores: float  # busy with other processes meanwhile
    times: dict[str, Timing]

    @property
    def disturbed(self) -> bool:
        return not self.others_cores <= BUSY  # unknown counts

    @property
    def us(self) -> float:
        return self.times["toppings"].us.median

    @property
    def gb_s(self) -> float:
        return self.bytes / self.us / 1e3

    @property
    def gflop_s(self) -> float:
        return self.flops / self.us / 1e3

    @property
    def peers(self) -> dict[str, Timing]:
        return {name: timing for name, timing in self.times.items() if name != "toppings"}


def summarize(times: dict[str, list[float]], baseline: str) -> dict[str, Timing]:
    """Times of equal length: entry i of each was measured in round i."""
    summary = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[baseline], strict=True)]
        summary[name] = Timing(len(values), _quartiles(values), _quartiles(ratios))
    return summary


def print_report(run: dict, machine: Machine, peaks: Peaks, results: list[Result]) -> None:
    console = Console()
    console.print(f"{machine}; torch {run['torch']}, toppings {run['toppings']}, {run['dtype']}")
    console.print(
        f"torch.sum reads {peaks.read_gb_s:.1f} GB/s, torch.mm {peaks.gemm_gflop_s:.0f} GFLOP/s; "
        f"seed {run['seed']}, {run['seconds']} s, "
        f"other processes used {run['others_cores']} cores"
    )
    peers = list(results[0].peers)
    table = Table(*("case", "H", "µs", "GB/s", "GFLOP/s"), *(f"{name} ×" for name in peers))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for n, result in enumerate(results):
        rates = (f"{result.us:.1f}", f"{result.gb_s:.1f}", f"{result.gflop_s:.1f}")
        ratios = (f"{peer.ratio.median:.2f}" for peer in result.peers.values())
        last = n + 1 == len(results) or results[n + 1].width != result.width
        name = f"{result.case} *" if result.disturbed else result.case
        table.add_row(name, str(result.width), *rates, *ratios, end_section=last)
    console.print(table)
    disturbed = sum(result.disturbed for result in results)
    if disturbed:
        console.print(f"* other processes were busy ({disturbed} of {len(results)}): run again")


def save_json(
    path: Path,
    run: dict,
    machine: Machine,
    peaks: tuple[Peaks, Peaks],
    results: list[Result],
) -> None:
    rows = [
        {**asdict(result), "gb_s": result.gb_s, "gflop_s": result.gflop_s} for result in results
    ]
    content = {
        **run,
        "machine": asdict(machine),
        "peaks": {"before": asdict(peaks[0]), "after": asdict(peaks[1])},
        "results": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def save_figure(path: Path, run: dict, machine: Machine, results: list[Result]) -> None:
    """Horizontal bars: the torch loop's time over toppings', with quartiles."""
    cases = list(dict.fromkeys(result.case for result in results))
    widths = sorted({result.width for result in results})
    height = 0.8 / len(widths)
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.22 * len(results)), layout="constrained")
    for k, width in enumerate(widths):
        bars = {result.case: result.times["torch loop"] for result in results
                if result.width == width}  # fmt: skip
        places = [cases.index(case) + (k - (len(widths) - 1) / 2) * height for case in bars]
        ratios = [timing.ratio for timing in bars.values()]
        medians = [ratio.median for ratio in ratios]
        spread = [
            [ratio.median - ratio.low for ratio in ratios],
            [ratio.high - ratio.median for ratio in ratios],
        ]
        axes.barh(places, medians, height * 0.92, color=COLOURS[k], label=f"H = {width}")
        axes.errorbar(medians, places, xerr=spread, fmt="none", ecolor="#555555", elinewidth=0.8)
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(f"{ratio.median:.1f}", (ratio.high, place), (4, 0), va="center",
                          textcoords="offset points", fontsize=8)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel("times faster than a torch loop of two GEMMs per adapter (1: level)")
    disturbed = sum(result.disturbed for result in results)
    note = f" (others busy in {disturbed} of {len(results)} cases)" if disturbed else ""
    axes.set_title(f"{machine}, {run['dtype']}\n{run['command']}{note}", fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _quartiles(values: list[float]) -> Quartiles:
    return Quartiles(*quantiles(values, n=4, method="inclusive"))
