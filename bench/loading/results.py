# SPDX-License-Identifier: Apache-2.0
"""What was measured, and how it is kept as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from machine import Machine
from timing import Quartiles

LINK_TIME, MEMCPY, DRIVER_COPY = "the link's own time", "memcpy", "cudaMemcpyAsync"
BUSY = 0.1  # cores used by other processes from which a case counts as disturbed


@dataclass(frozen=True)
class Case:
    """What all cases have in common."""

    rounds: int
    others_cores: float  # busy with other processes meanwhile

    @property
    def disturbed(self) -> bool:
        return not self.others_cores <= BUSY  # unknown counts


@dataclass(frozen=True)
class Bandwidth(Case):
    device: str
    emulated: bool
    latency_us: float  # of an emulated link
    block_bytes: int  # of a layer
    layers: int
    layers_us: Quartiles  # from load() until the last layer is there
    baseline: str  # LINK_TIME on an emulated link, MEMCPY on the host without one, or DRIVER_COPY
    copy_us: Quartiles  # one contiguous copy of the same bytes without the loader, as baseline says
    share: Quartiles  # copy_us / layers_us of the same round
    one_us: Quartiles  # the same bytes as one layer, through the loader
    one_share: Quartiles  # one_us / layers_us of the same round
    first_us: Quartiles  # from load() until the first layer is there
    own_us: Quartiles  # the first layer's transfer; on an emulated link by definition
    late_us: Quartiles  # first_us - own_us

    @property
    def label(self) -> str:
        return f"{self.device}, {size(self.block_bytes)} × {self.layers}"

    @property
    def gb_s(self) -> float:
        return self.block_bytes * self.layers / self.layers_us.median / 1e3

    @property
    def copy_gb_s(self) -> float:
        return self.block_bytes * self.layers / self.copy_us.median / 1e3

    @property
    def one_gb_s(self) -> float:
        return self.block_bytes * self.layers / self.one_us.median / 1e3


@dataclass(frozen=True)
class Overhead(Case):
    waits: str
    layers: int
    wall_us: Quartiles  # per layer
    cpu_us: Quartiles  # of all threads, per layer

    @property
    def label(self) -> str:
        return f"layers awaited {self.waits}"


@dataclass(frozen=True)
class Concurrent(Case):
    device: str
    emulated: bool
    loads: int
    bytes_each: int
    gb_s: Quartiles  # all together
    share: Quartiles  # of the rate of a load alone, in the same round
    spread: Quartiles  # (last end - first end) / last end
    urgent: Quartiles  # an urgent load's time beside the others / alone


@dataclass(frozen=True)
class Prefill(Case):
    device: str
    emulated: bool
    model: str
    rank: int
    prompt: int
    layers: int
    layer_bytes: int
    ratio: float | None  # asked for, of a layer's transfer to its compute; None on a real link
    transfer_ms: float  # of one layer
    ms: dict[str, Quartiles]  # time to the first token by mode; "warm": a second time, layerwise
    excess: dict[str, Quartiles]  # (cold layerwise - transfer_ms) / cached, and / warm

    @property
    def measured_ratio(self) -> float:
        return self.transfer_ms / (self.ms["cached"].median / self.layers)

    @property
    def label(self) -> str:
        return f"{self.device}, rank {self.rank}, {self.prompt} tokens"


@dataclass(frozen=True)
class Decode(Case):
    device: str
    emulated: bool
    model: str
    rank: int  # of the adapters that are loaded
    loads_for: str
    running: int
    loaded_gb_s: float  # while loads were on
    quiet_ms: Quartiles  # between tokens
    loading_ms: Quartiles
    ratio: Quartiles  # of a pair's medians, loading / quiet
    quiet_p99_ms: float
    loading_p99_ms: float

    @property
    def p99_ratio(self) -> float:
        return self.loading_p99_ms / self.quiet_p99_ms

    @property
    def label(self) -> str:
        return f"{self.device}, loads for {self.loads_for}"


KINDS: dict[str, type[Case]] = {
    "bandwidth": Bandwidth,
    "overhead": Overhead,
    "concurrent": Concurrent,
    "prefill": Prefill,
    "decode": Decode,
}


@dataclass(frozen=True)
class Report:
    command: str
    commit: str | None
    seed: int
    seconds: float
    others_cores: float
    machine: Machine
    device: str  # "host", or the GPU
    cores: str
    memcpy_gb_s: float  # of 32 MB, one thread, outside the cache
    shows_disturbed: bool  # only to look at: they say little
    absent: list[str]  # parts that were left out, and why
    bandwidth: list[Bandwidth]
    overhead: list[Overhead]
    concurrent: list[Concurrent]
    prefill: list[Prefill]
    decode: list[Decode]

    def hides(self, case: Case) -> bool:
        return case.disturbed and not self.shows_disturbed

    def cases(self) -> list[Case]:
        return [case for kind in KINDS for case in getattr(self, kind)]


def size(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(asdict(report)), ensure_ascii=False)
    path.write_text(text.replace('{"rounds": ', '\n{"rounds": ') + "\n")


def load(path: Path) -> Report:
    content = json.loads(path.read_text())
    machine = Machine(**content.pop("machine"))
    cases = {kind: [_case(cls, row) for row in content.pop(kind)] for kind, cls in KINDS.items()}
    return Report(machine=machine, **cases, **content)


def _case(cls: type[Case], row: dict[str, Any]) -> Case:
    return cls(**{field.name: _value(row[field.name]) for field in fields(cls)})


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"low", "median", "high"}:
        return Quartiles(**value)
    return {name: _value(entry) for name, entry in value.items()}


def _rounded(value: Any) -> Any:
    """Five digits are more than any of it is worth."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
