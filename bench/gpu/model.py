# SPDX-License-Identifier: Apache-2.0
"""What a call cannot do without: bytes and FLOP, and the time the card needs for them.

The compulsory part of docs/kernels.md, "Traffic". Planes of v are left out: they live in L2, and
how many there are is the implementation's choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu.cases import Case

BYTES = 2  # of a number: bf16


@dataclass(frozen=True)
class Work:
    weight_bytes: int  # of the adapters in use, each once, at their own ranks
    bytes: int  # and x read, y read and written
    flops: int


def work_of(case: Case) -> Work:
    site, total_width = case.site, sum(case.site.widths)
    row = len(site.widths) * site.width_in + total_width  # numbers in a rank row of all projections
    weights = sum(case.adapter_ranks) * row * BYTES
    tokens = tokens_per_adapter(case)
    rank_tokens = sum(r * t for r, t in zip(case.adapter_ranks, tokens, strict=True))
    activations = case.tokens * (site.width_in + 2 * total_width) * BYTES
    return Work(weights, weights + activations, 2 * rank_tokens * row)


def tokens_per_adapter(case: Case) -> list[int]:
    counts = [0] * case.adapters
    for token in range(case.tokens):
        counts[token * case.adapters // case.tokens] += 1
    return counts


def roofline_us(work: Work, gb_s: float, tflop_s: float) -> float:
    return max(work.bytes / gb_s / 1e3, work.flops / tflop_s / 1e6)
