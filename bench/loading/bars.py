# SPDX-License-Identifier: Apache-2.0
"""What the loader promises, and which of it the measured cases keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from loading.cases import MB
from loading.results import MEMCPY, Bandwidth, Case, Prefill, Report

T = TypeVar("T", bound=Case)

LEAST_SHARE = 0.95
LAYER_US = 2.0  # of host work
FIRST_FACTOR, FIRST_US = 1.2, 20.0
PREFILL_EXCESS = 1.03
ITL_EXCESS = 1.05


@dataclass(frozen=True)
class Check:
    """One case against its bar; value and limit in the bar's unit."""

    label: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def miss(self) -> float:
        """By how much, as a share of the limit; 0 or less: met."""
        over = self.value / self.limit - 1
        return -over if self.at_least else over


@dataclass(frozen=True)
class Bar:
    promise: str
    unit: Callable[[float], str]
    checks: list[Check]
    disturbed: int  # cases, left out unless the report shows them

    @property
    def worst(self) -> Check | None:
        return max(self.checks, key=lambda check: check.miss, default=None)

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if not check.miss <= 0]

    @property
    def verdict(self) -> str:
        if self.worst is None:
            return "not measured"
        if not self.missed:
            return "met"
        return f"missed by {self.worst.miss:.1%} in {len(self.missed)} of {len(self.checks)}"


def least_share(case: Bandwidth) -> float:
    if case.block_bytes >= MB:
        return LEAST_SHARE
    own_us = case.copy_us.median / case.layers
    return own_us / (own_us + LAYER_US)


def all_bars(report: Report) -> list[Bar]:
    def bar(
        promise: str, unit: Callable[[float], str], cases: Sequence[T], check: Callable[[T], Check]
    ) -> Bar:
        shown = [case for case in cases if not report.hides(case)]
        disturbed = sum(case.disturbed for case in cases)
        return Bar(promise, unit, [check(case) for case in shown], disturbed)

    on_link = [case for case in report.bandwidth if case.baseline != MEMCPY]
    in_memory = [case for case in report.bandwidth if case.baseline == MEMCPY]
    large = [case for case in on_link if case.block_bytes >= MB]
    small = [case for case in on_link if case.block_bytes < MB]
    return [
        bar(
            f"on a link, layer blocks of 1 MB and more: {LEAST_SHARE:.0%} of one contiguous copy's "
            "bandwidth",
            *(percent, large, _share),
        ),
        bar(
            f"smaller ones: t / (t + {LAYER_US:g} µs) of it, t a block's own time",
            *(percent, small, _share),
        ),
        bar(
            "host without a link: the same shares of one memcpy",
            *(percent, in_memory, _share),
        ),
        bar(
            f"first layer: {FIRST_FACTOR:g} × its transfer + {FIRST_US:g} µs",
            *(micros, report.bandwidth, _first),
        ),
        bar(
            f"host work per layer: {LAYER_US:g} µs of CPU time beyond the driver's calls",
            *(micros, report.overhead, lambda c: Check(c.label, c.cpu_us.median, LAYER_US)),
        ),
        bar(
            "cold prefill, layer-wise: mode cached + one layer's transfer + 3 %",
            *(ratio, slow_enough(report.prefill), lambda c: _prefill(c, "cached")),
        ),
        bar(
            "the same beside a warm request of the same engine",
            *(ratio, slow_enough(report.prefill), lambda c: _prefill(c, "warm")),
        ),
        bar(
            "time between tokens of others during loads, median: 5 % above undisturbed",
            *(ratio, report.decode, lambda c: Check(c.label, c.ratio.median, ITL_EXCESS)),
        ),
        bar(
            "the same, 99th percentile",
            *(ratio, report.decode, lambda c: Check(c.label, c.p99_ratio, ITL_EXCESS)),
        ),
    ]


def slow_enough(cases: Sequence[Prefill]) -> list[Prefill]:
    """Those where a layer's transfer takes no longer than its compute, as far as asked for."""
    return [case for case in cases if case.ratio is not None or case.measured_ratio <= 1]


def percent(value: float) -> str:
    return f"{value:.1%}"


def micros(value: float) -> str:
    return f"{value:.2f} µs" if value < 10 else f"{value:.0f} µs"


def ratio(value: float) -> str:
    return f"{value:.3f} ×"


def _share(case: Bandwidth) -> Check:
    return Check(case.label, case.share.median, least_share(case), at_least=True)


def _first(case: Bandwidth) -> Check:
    limit = FIRST_FACTOR * case.own_us.median + FIRST_US
    return Check(case.label, case.first_us.median, limit)


def _prefill(case: Prefill, beside: str) -> Check:
    return Check(case.label, case.excess[beside].median, PREFILL_EXCESS)
