# SPDX-License-Identifier: Apache-2.0
"""What was measured, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from timing import Quartiles, Timing

from gpu.cases import Case, Site
from gpu.model import Work, roofline_us
from gpu.peaks import Peaks
from gpu.peers.interface import Absent

BASELINE = "toppings"
MODES = ("eager", "graph")


@dataclass(frozen=True)
class Device:
    name: str
    capability: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    driver: str | None
    cuda: str | None  # torch's
    host: str

    def __str__(self) -> str:
        return (
            f"{self.name}, sm_{self.capability}, {self.multiprocessors} multiprocessors, "
            f"{self.l2_bytes >> 20} MiB L2, {self.memory_bytes >> 30} GiB, driver {self.driver}, "
            f"CUDA {self.cuda}"
        )


@dataclass(frozen=True)
class Result:
    case: Case
    calls: int  # with weights of their own; so many in a graph
    work: Work
    errors: dict[str, float]
    failures: list[Absent]
    times: dict[str, dict[str, Timing]]  # by mode, by implementation; µs of one call

    def us(self, mode: str) -> float | None:
        return self.times[mode][BASELINE].us.median if mode in self.times else None

    def gb_s(self, mode: str) -> float | None:
        us = self.us(mode)
        return None if us is None else self.work.bytes / us / 1e3

    def share_of_roofline(self, mode: str, peaks: Peaks) -> float | None:
        us = self.us(mode)
        return None if us is None else roofline_us(self.work, peaks.gb_s, peaks.mm_tflop_s) / us

    def ratio(self, mode: str, name: str) -> float | None:
        timing = self.times.get(mode, {}).get(name)
        return None if timing is None else timing.ratio.median


@dataclass(frozen=True)
class Report:
    command: str
    commit: str | None
    seed: int
    rehearsal: bool  # on the CPU, tiny: the times mean nothing
    seconds: float
    left_out: int  # cases, because the time was up
    stopped: str | None  # by what error, before the end
    device: Device
    versions: dict[str, str]  # of what was measured
    absent: list[Absent]
    peaks: Peaks  # the better of before and after
    results: list[Result]

    @property
    def failed(self) -> bool:
        """toppings itself: wrong, failed, or nothing was measured."""
        wrong = any(BASELINE not in result.errors for result in self.results)
        missing = any(mode not in result.times for result in self.results for mode in MODES)
        return wrong or missing or self.stopped is not None or not self.results

    def peer_names(self) -> list[str]:
        return [name for name in self.versions if name != BASELINE]


def save(report: Report, path: Path) -> None:
    content = asdict(report)
    for row, result in zip(content["results"], report.results, strict=True):
        row["times"] = {
            mode: {name: _timing_row(timing) for name, timing in timings.items()}
            for mode, timings in result.times.items()
        }
        row["derived"] = {
            mode: {
                "gb_s": result.gb_s(mode),
                "share_of_bandwidth": result.gb_s(mode) / report.peaks.gb_s,
                "share_of_roofline": result.share_of_roofline(mode, report.peaks),
            }
            for mode in result.times
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(text.replace('{"case": ', '\n{"case": ') + "\n")


def load(path: Path) -> Report:
    content = json.loads(path.read_text())
    results = [_result(row) for row in content.pop("results")]
    return Report(
        results=results,
        device=Device(**content.pop("device")),
        absent=[Absent(**row) for row in content.pop("absent")],
        peaks=Peaks(**content.pop("peaks")),
        **content,
    )


def _result(row: dict) -> Result:
    site = row["case"].pop("site")
    site = Site(**{**site, "widths": tuple(site["widths"])})
    case = Case(**{**row["case"], "site": site, "ranks": tuple(row["case"]["ranks"])})
    times = {
        mode: {
            name: Timing(t["rounds"], Quartiles(*t["us"]), Quartiles(*t["ratio"]))
            for name, t in timings.items()
        }
        for mode, timings in row["times"].items()
    }
    failures = [Absent(**failure) for failure in row["failures"]]
    return Result(case, row["calls"], Work(**row["work"]), row["errors"], failures, times)


def _timing_row(timing: Timing) -> dict:
    """Quartiles as low, median, high."""
    us, ratio = ([*asdict(q).values()] for q in (timing.us, timing.ratio))
    digits = [[round(value, 4) for value in values] for values in (us, ratio)]
    return {"rounds": timing.rounds, "us": digits[0], "ratio": digits[1]}
