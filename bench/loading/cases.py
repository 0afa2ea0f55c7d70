# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data."""

from __future__ import annotations

from dataclasses import dataclass

KB, MB = 1 << 10, 1 << 20
BLOCKS = tuple(16 * KB << n for n in range(11))  # 16 KB ... 16 MB
PREFILL_RATIOS = (0.25, 0.5, 1.0)  # a layer's transfer over its compute


@dataclass(frozen=True)
class Link:
    """Of the host device; without a rate: none, copies are plain ones."""

    bytes_per_second: float | None = None
    latency_seconds: float = 0.0

    def seconds(self, nbytes: int) -> float:
        """What a copy takes that has an emulated link to itself, by the link's definition."""
        if self.bytes_per_second is None:
            raise ValueError("link: expected an emulated one, got none")
        return self.latency_seconds + nbytes / self.bytes_per_second


LINKS = (Link(), *(Link(rate, latency) for rate in (2e9, 4e9) for latency in (0.0, 1e-5)))


@dataclass(frozen=True)
class Plan:
    """Sizes and how long each case is measured. seconds: beside the least number of rounds."""

    links: tuple[Link, ...] = LINKS
    blocks: tuple[int, ...] = BLOCKS
    seconds: float = 1.5
    rounds: int = 21
    overhead_layers: int = 512
    overhead_repeats: int = 200
    concurrent_links: tuple[Link, ...] = (Link(), Link(4e9, 1e-5))
    concurrent: tuple[int, ...] = (1, 2, 4, 8)
    concurrent_layers: int = 8
    concurrent_block: int = 2 * MB
    ranks: tuple[int, ...] = (16, 64)
    ratios: tuple[float, ...] = PREFILL_RATIOS
    prompt: int = 128
    prefill_rounds: int = 15
    decode_rates: tuple[float, ...] = (1e8, 1e9)
    decode_rank: int = 64
    decode_windows: int = 12  # pairs of them, with and without loads
    decode_steps: int = 20  # of one window

    def layers(self, block: int) -> int:
        """Up to 32 MB in all, and at least four layers."""
        return min(32, max(4, 32 * MB // block))


FULL = Plan()
QUICK = Plan(
    links=(Link(), Link(4e9, 1e-5)),
    blocks=(64 * KB, MB),
    seconds=0.2,
    rounds=5,
    overhead_repeats=20,
    concurrent_links=(Link(4e9, 1e-5),),
    concurrent=(1, 4),
    ranks=(16,),
    ratios=(0.5,),
    prefill_rounds=3,
    decode_rates=(1e9,),
    decode_windows=2,
    decode_steps=8,
)
# For a GPU's real link, within the time that `make gpu` has.
CUDA = Plan(
    links=(Link(),),
    seconds=0.5,
    concurrent_links=(Link(),),
    concurrent_block=8 * MB,
    ratios=(1.0,),  # not a ratio there: one case for each rank
    prompt=512,
    decode_rates=(1.0,),
    decode_windows=12,
)
TINY = Plan(  # of the tests
    links=(Link(), Link(1e9, 1e-5)),
    blocks=(64 * KB,),
    seconds=0,
    rounds=3,
    overhead_layers=32,
    overhead_repeats=3,
    concurrent_links=(Link(1e9),),
    concurrent=(1, 2),
    concurrent_layers=2,
    concurrent_block=64 * KB,
    ranks=(8,),
    ratios=(1.0,),
    prompt=8,
    prefill_rounds=3,
    decode_rates=(1e9,),
    decode_rank=8,
    decode_windows=2,
    decode_steps=3,
)
