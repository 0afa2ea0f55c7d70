# SPDX-License-Identifier: Apache-2.0
"""What was measured, and how it is kept as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cases import SIZES, Case
from machine import Machine
from peaks import Peaks
from peers import Absent
from timing import Quartiles, Timing

BASELINE = "toppings"
READ = "plain read"  # of the same weights, no implementation: plain_read.py
BUSY = 0.1  # cores used by other processes from which a case counts as disturbed
TORCH = ("torch loop", "torch addmm")
LIBRARIES = ("oneDNN", "libxsmm")


@dataclass(frozen=True)
class Result:
    case: Case
    weight_sets: int
    weight_bytes: int  # of the adapters in use, at their own ranks
    flops: int
    errors: dict[str, float]
    others_cores: float  # busy with other processes meanwhile
    times: dict[str, Timing]

    @property
    def disturbed(self) -> bool:
        return not self.others_cores <= BUSY  # unknown counts

    @property
    def us(self) -> float:
        return self.times[BASELINE].us.median

    @property
    def gb_s(self) -> float:
        return self.weight_bytes / self.us / 1e3

    @property
    def gflop_s(self) -> float:
        return self.flops / self.us / 1e3

    @property
    def read_gb_s(self) -> float | None:
        """Of the plain read in the same rounds; None where there was none."""
        return self.weight_bytes / self.times[READ].us.median / 1e3 if READ in self.times else None

    def fastest(self, names: tuple[str, ...]) -> Timing | None:
        """Of those that were measured."""
        timings = [self.times[name] for name in names if name in self.times]
        return min(timings, key=lambda timing: timing.ratio.median, default=None)

    def bound(self, peaks: Peaks) -> str:
        """What limits the call: memory, where cold weights take longer to read than to use."""
        if self.case.tokens == 1 and not self.case.cold:
            return "call"  # its overhead
        read = self.weight_bytes / (self.read_gb_s or peaks.read_gb_s)
        compute = self.flops / peaks.gflop_s(self.case.dtype)
        return "memory" if self.case.cold and read > compute else "compute"

    def share(self, peaks: Peaks) -> float | None:
        """Of the measured peak of what limits the call; of memory: of a plain read's speed."""
        if self.bound(peaks) == "call":
            return None
        if self.bound(peaks) == "memory":
            return self.times[READ].ratio.median if READ in self.times else None
        return self.gflop_s / peaks.gflop_s(self.case.dtype)


@dataclass(frozen=True)
class Report:
    command: str
    commit: str | None
    seed: int
    seconds: float
    others_cores: float
    versions: dict[str, str]  # of what was measured
    absent: list[Absent]
    machine: Machine
    peaks_before: list[Peaks]  # one for each number of threads
    peaks_after: list[Peaks]
    results: list[Result]

    def peaks(self, threads: int) -> Peaks:
        """The better of before and after."""
        before, after = (
            next(peaks for peaks in both if peaks.threads == threads)
            for both in (self.peaks_before, self.peaks_after)
        )
        return before.best(after)

    def peer_names(self) -> list[str]:
        return [name for name in self.versions if name != BASELINE]

    def sections(self) -> list[tuple[str, int, list[Result]]]:
        """By dtype and threads, in reading order."""
        groups = list(dict.fromkeys(result.case.group for result in self.results))

        def order(result: Result) -> tuple:
            case = result.case
            return (
                groups.index(case.group),
                *case.pool[:2],
                len(case.ranks),
                max(case.ranks),
                case.tokens,
            )

        sections: dict[tuple[str, int], list[Result]] = {}
        for result in sorted(self.results, key=order):
            sections.setdefault((result.case.dtype, result.case.threads), []).append(result)
        dtypes = list(SIZES)
        keys = sorted(sections, key=lambda key: (dtypes.index(key[0]), -key[1]))
        return [(*key, sections[key]) for key in keys]


def save(report: Report, path: Path) -> None:
    content = asdict(report)
    for row, result in zip(content["results"], report.results, strict=True):
        peaks = report.peaks(result.case.threads)
        row |= {"gb_s": result.gb_s, "gflop_s": result.gflop_s}
        row |= {"plain_read_gb_s": result.read_gb_s}
        row |= {"bound": result.bound(peaks), "share_of_peak": result.share(peaks)}
        row["times"] = {name: _timing_row(timing) for name, timing in result.times.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(text.replace('{"case": ', '\n{"case": ') + "\n")


def load(path: Path) -> Report:
    content = json.loads(path.read_text())
    results = []
    for row in content.pop("results"):
        case = Case(**{**row["case"], "ranks": tuple(row["case"]["ranks"])})
        times = {
            name: Timing(t["rounds"], Quartiles(*t["us"]), Quartiles(*t["ratio"]))
            for name, t in row["times"].items()
        }
        names = ("weight_sets", "weight_bytes", "flops", "errors", "others_cores")
        results.append(Result(case=case, times=times, **{name: row[name] for name in names}))
    return Report(
        results=results,
        absent=[Absent(**row) for row in content.pop("absent")],
        machine=Machine(**content.pop("machine")),
        peaks_before=[Peaks(**row) for row in content.pop("peaks_before")],
        peaks_after=[Peaks(**row) for row in content.pop("peaks_after")],
        **content,
    )


def _timing_row(timing: Timing) -> dict:
    """Quartiles as low, median, high."""
    us, ratio = ([*asdict(q).values()] for q in (timing.us, timing.ratio))
    digits = [[round(value, 4) for value in values] for values in (us, ratio)]
    return {"rounds": timing.rounds, "us": digits[0], "ratio": digits[1]}
