# SPDX-License-Identifier: Apache-2.0
"""The grid: what is measured, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIXED = (8, 16, 32, 64)
WIDTHS = (576, 4096, 4160)  # 4096: rows collide in the caches, see docs/benchmarks.md
ADAPTERS = 64  # that the tokens of a popularity case choose from
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Case:
    """One call: T tokens, one projection of K inputs and N outputs."""

    group: str
    tokens: int  # T
    ranks: tuple[int, ...]  # adapter i has rank ranks[i % len(ranks)]
    width_in: int  # K
    width_out: int  # N
    popularity: str  # see inputs.assign
    adapters: int  # that tokens choose from
    cold: bool  # each call takes other weights, from a pool larger than the caches
    dtype: str = "bf16"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.adapters % len(self.ranks) != 0:
            raise ValueError(
                f"adapters: expected a multiple of {len(self.ranks)}, got {self.adapters}"
            )

    @property
    def pool(self) -> tuple[int, int, tuple[int, ...], str]:
        """Cases that agree in this take their weights from one pool."""
        return (self.width_in, self.width_out, self.ranks, self.dtype)

    @property
    def is_decode(self) -> bool:
        """A token for each request, not whole prompts."""
        return self.tokens == 1 or self.group.startswith("decode")

    @property
    def rank_label(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        return f"{low}" if low == high else f"{low}-{high}"

    @property
    def width_label(self) -> str:
        same = self.width_in == self.width_out
        return f"{self.width_in}" if same else f"{self.width_in}→{self.width_out}"

    @property
    def label(self) -> str:
        """Without widths, dtype and threads."""
        return f"{self.group}, T={self.tokens}, r={self.rank_label}"

    def adapter_bytes(self) -> float:
        """Of the mean adapter."""
        rows = sum(self.ranks) / len(self.ranks)
        return rows * (self.width_in + self.width_out) * SIZES[self.dtype]


def prefill(tokens: int, rank: int, width: int, cold: bool = False) -> Case:
    group = "prefill, cold weights" if cold else "prefill"
    return Case(group, tokens, (rank,), width, width, "identical", 1, cold)


def segments(width: int, rank: int = 16) -> Case:
    return Case("32 short prompts", 512, (rank,), width, width, "equal", 32, False)


def decode(tokens: int, ranks: tuple[int, ...], width: int) -> Case:
    group = "decode, distinct adapters"
    return Case(group, tokens, ranks, width, width, "distinct", tokens, True)


def one_adapter(width: int) -> Case:
    return Case("decode, one warm adapter", 64, (16,), width, width, "identical", 1, False)


def popular(popularity: str, width: int) -> Case:
    group = f"decode, {popularity}"
    return Case(group, 64, (16,), width, width, popularity, ADAPTERS, True)


def smallest() -> Case:
    return Case("smallest call", 1, (8,), 576, 576, "identical", 1, False)


def rectangular(cases: list[Case]) -> list[Case]:
    """K ≠ N, as of an MLP's projections."""
    wide = [replace(case, width_in=4096, width_out=14336) for case in cases]
    return wide + [replace(case, width_in=14336, width_out=4096) for case in cases]


def bf16_cases() -> list[Case]:
    cases = [smallest()]
    for width in WIDTHS:
        for rank in (8, 16, 64, 128):
            tokens = (64, 256, 512) if width == 4160 else (256,)
            cases += [prefill(count, rank, width) for count in tokens]
        cases.append(segments(width))
        for rank in (8, 16, 64, 128):
            tokens = (1, 16, 64) if width > 576 else (1, 64)
            cases += [decode(count, (rank,), width) for count in tokens]
        cases += [decode(count, MIXED, width) for count in (16, 64)]
        cases.append(one_adapter(width))
    cases.append(prefill(256, 16, 4160, cold=True))
    cases += [popular(kind, 4160) for kind in ("identical", "zipf", "uniform")]
    return cases + rectangular([prefill(256, 16, 0), decode(16, (16,), 0)])


def small_cases() -> list[Case]:
    """What is repeated in other dtypes and with other numbers of threads."""
    cases = [prefill(256, rank, 4160) for rank in (8, 16, 64)]
    cases += [segments(4160), one_adapter(4160)]
    return cases + [decode(tokens, (16,), 4160) for tokens in (1, 64)]


def quick_cases() -> list[Case]:
    cases = [smallest(), prefill(64, 16, 4160), prefill(256, 64, 576), segments(576)]
    return cases + [decode(1, (16,), 4160), decode(64, (16,), 576), popular("zipf", 576)]


def make_cases(threads: list[int], dtypes: list[str], quick: bool) -> list[Case]:
    """bf16 in full with the most threads; the small grid for all the others.

    Cases of one pool and one number of threads stand together.
    """
    most = max(threads)
    cases = []
    for dtype in dtypes:
        for count in sorted(threads, reverse=True):
            full = dtype == "bf16" and count == most
            grid = quick_cases() if quick else bf16_cases() if full else small_cases()
            if not (full or quick):
                grid = [smallest(), *grid] if dtype == "bf16" else grid
            cases += [replace(case, dtype=dtype, threads=count) for case in grid]
    order = {key: n for n, key in enumerate(dict.fromkeys((c.threads, *c.pool) for c in cases))}
    return sorted(cases, key=lambda case: order[(case.threads, *case.pool)])
