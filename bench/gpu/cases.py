# SPDX-License-Identifier: Apache-2.0
"""The grid, as data: which calls are measured, most telling ones first."""

from __future__ import annotations

from dataclasses import dataclass

MIXED = (8, 16, 32, 64, 128)
RANKS = ((8,), (16,), (64,), MIXED)
DECODE_TOKENS = (1, 8, 16, 32, 64)
PREFILL_TOKENS = (512, 2048, 8192)
SEGMENTS = (1, 4, 64)


@dataclass(frozen=True)
class Site:
    """Projections of one input, in one launch."""

    model: str
    name: str
    width_in: int  # K
    widths: tuple[int, ...]  # N_s

    @property
    def label(self) -> str:
        return f"{self.model} {self.name}"


SITES = (
    Site("8B", "qkv", 4096, (4096, 1024, 1024)),
    Site("8B", "o", 4096, (4096,)),
    Site("8B", "gate_up", 4096, (14336, 14336)),
    Site("8B", "down", 14336, (4096,)),
    Site("70B/8", "qkv", 8192, (1024, 128, 128)),
    Site("70B/8", "o", 1024, (8192,)),
    Site("70B/8", "gate_up", 8192, (3584, 3584)),
    Site("70B/8", "down", 3584, (8192,)),
)
TINY_SITES = (Site("tiny", "qkv", 64, (64, 32, 32)), Site("tiny", "o", 64, (32,)))


@dataclass(frozen=True)
class Case:
    """T tokens, spread evenly over adapters: shuffled in decode, a segment each in prefill."""

    phase: str  # "decode" or "prefill"
    site: Site
    tokens: int  # T
    adapters: int
    ranks: tuple[int, ...]  # adapter i has rank ranks[i % len(ranks)]

    def __post_init__(self) -> None:
        if not 1 <= self.adapters <= self.tokens:
            raise ValueError(f"adapters: expected 1 to {self.tokens}, got {self.adapters}")

    @property
    def adapter_ranks(self) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(self.adapters)]

    @property
    def rank_label(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        return f"{low}" if low == high else f"{low}-{high}"

    @property
    def label(self) -> str:
        return (
            f"{self.phase}, {self.site.label}, T={self.tokens}, "
            f"adapters={self.adapters}, r={self.rank_label}"
        )


def decode_cases(site: Site) -> list[Case]:
    """T × adapters {1, 8, all distinct} × ranks."""
    cases = []
    for tokens in DECODE_TOKENS:
        for adapters in sorted({1, min(8, tokens), tokens}):
            for ranks in RANKS:
                if len(ranks) == 1 or adapters > 1:
                    cases.append(Case("decode", site, tokens, adapters, ranks))
    return cases


def prefill_cases(site: Site) -> list[Case]:
    shapes = [(tokens, segments) for tokens in PREFILL_TOKENS for segments in SEGMENTS]
    return [
        Case("prefill", site, tokens, segments, ranks)
        for tokens, segments in shapes
        for ranks in RANKS
        if len(ranks) == 1 or segments > 1
    ]


def few_cases(site: Site) -> list[Case]:
    """What is measured at every site."""
    decode = [(1, 1, (16,)), (16, 16, (16,)), (64, 1, (16,)), (64, 8, (16,)), (64, 64, (16,))]
    decode += [(64, 64, (64,)), (64, 64, MIXED)]
    prefill = [(512, 1, (16,)), (2048, 4, (16,)), (2048, 64, (16,)), (2048, 4, (64,))]
    return [Case("decode", site, *shape) for shape in decode] + [
        Case("prefill", site, *shape) for shape in prefill
    ]


def make_cases(full: bool = False) -> list[Case]:
    """Every site with few cases, then q, k, v of the 8B model in all; full: all in all."""
    everything = SITES if full else SITES[:1]
    cases = [case for site in SITES for case in few_cases(site)]
    for site in everything:
        cases += decode_cases(site) + prefill_cases(site)
    return list(dict.fromkeys(cases))


def tiny_cases() -> list[Case]:
    """For the rehearsal on the CPU: every code path, no meaningful time."""
    shapes = [("decode", 1, 1), ("decode", 8, 8), ("decode", 8, 1), ("decode", 12, 8)]
    shapes += [("prefill", 64, 1), ("prefill", 64, 4), ("prefill", 66, 4)]
    return [
        Case(phase, site, tokens, adapters, ranks)
        for site in TINY_SITES
        for phase, tokens, adapters in shapes
        for ranks in ((8,), (8, 16, 32))
        if len(ranks) == 1 or adapters > 1
    ]
