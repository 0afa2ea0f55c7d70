# SPDX-License-Identifier: Apache-2.0
"""The grid and the tokens: what the benchmark says it measures is what it measures."""

from itertools import groupby

import pytest
import torch
from cases import Case, decode, make_cases, popular, prefill, segments
from inputs import assign, make_segments, pool_count

POPULARITIES = ("identical", "equal", "distinct", "uniform", "zipf")


def make_case(popularity: str) -> Case:
    return Case("decode", 64, (8,), 64, 64, popularity, 64, True)


@pytest.mark.parametrize("quick", [False, True])
def test_cases_of_a_pool_stand_together(quick: bool):
    cases = make_cases([1, 2], ["bf16", "fp16", "fp32"], quick)
    keys = [key for key, _ in groupby(cases, key=lambda case: (case.threads, case.pool))]
    assert len(keys) == len(set(keys))
    assert len(cases) == len(set(cases))


def test_only_bf16_with_the_most_threads_is_measured_in_full():
    cases = make_cases([1, 2], ["bf16", "fp32"], quick=False)
    counts = {}
    for case in cases:
        key = (case.dtype, case.threads)
        counts[key] = counts.get(key, 0) + 1
    assert counts[("bf16", 2)] > 2 * max(
        counts[key] for key in (("bf16", 1), ("fp32", 1), ("fp32", 2))
    )


def test_every_group_of_the_targets_is_there():
    cases = set(make_cases([2], ["bf16"], quick=False))
    shapes = {(case.group, case.tokens, case.ranks, case.width_in) for case in cases}
    wanted = [prefill(tokens, rank, 4160) for tokens in (64, 256, 512) for rank in (8, 16, 64, 128)]
    wanted += [decode(tokens, (rank,), 4160) for tokens in (1, 16, 64) for rank in (8, 16, 64, 128)]
    wanted += [segments(4160), decode(64, (8, 16, 32, 64), 4160), popular("zipf", 4160)]
    for case in wanted:
        assert (case.group, case.tokens, case.ranks, case.width_in) in shapes, case
    assert any(case.width_in != case.width_out for case in cases)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_segments_cover_the_sorted_tokens(popularity: str):
    case = make_case(popularity)
    local = assign(case, torch.Generator().manual_seed(3))
    assert len(local) == case.tokens
    assert int(local.min()) >= 0 and int(local.max()) < case.adapters
    ordered = local.sort().values
    parts = make_segments(ordered.tolist())
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == case.tokens
    for part in parts:
        assert set(ordered[part.start : part.stop].tolist()) == {part.local}
    assert len({part.local for part in parts}) == len(parts)


def test_popularity_is_what_its_name_says():
    def used(popularity: str) -> int:
        local = assign(make_case(popularity), torch.Generator().manual_seed(3))
        return len(local.unique())

    assert used("distinct") == used("equal") == 64
    assert used("identical") == 1
    assert 1 < used("zipf") < used("uniform") < 64
    with pytest.raises(ValueError, match="popularity: expected .*, got often"):
        used("often")


def test_a_pool_holds_whole_sets_of_every_case():
    cases = [decode(1, (16,), 576), decode(64, (16,), 576)]
    count = pool_count(cases, pool_bytes=96 << 20)
    assert count % 64 == 0
    assert count * cases[0].adapter_bytes() >= 96 << 20
    assert pool_count(cases, pool_bytes=1) == 128  # two sets of the largest
    assert pool_count([prefill(64, 16, 576)], pool_bytes=96 << 20) == 1
