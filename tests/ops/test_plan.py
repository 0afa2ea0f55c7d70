# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .lora_case import ops


def make(token_slots: list[int], num_slots: int) -> list[int]:
    return ops.lora_plan(torch.tensor(token_slots, dtype=torch.int32), num_slots).tolist()


def expected(token_slots: list[int]) -> list[int]:
    active = [t for t, slot in enumerate(token_slots) if slot >= 0]
    order = sorted(active, key=lambda t: token_slots[t])
    begins = [
        n for n, t in enumerate(order) if n == 0 or token_slots[t] != token_slots[order[n - 1]]
    ]
    tokens, ends = len(token_slots), [*begins, len(order)]
    padding = [-1] * (tokens - len(order)), [-1] * (tokens + 1 - len(ends))
    return [len(begins), *order, *padding[0], *ends, *padding[1]]


@given(st.integers(1, 300).flatmap(lambda n: st.lists(st.integers(-1, n - 1), max_size=200)))
@settings(max_examples=200, deadline=None)
def test_tokens_grouped_by_slot(token_slots: list[int]) -> None:
    assert make(token_slots, 300) == expected(token_slots)


def test_its_size_depends_on_tokens_alone() -> None:
    assert len(make([], 0)) == 2
    assert len(make([0] * 9, 1)) == len(make([-1] * 9, 1000)) == 20


@pytest.mark.parametrize("tokens", [3, 100])
def test_refused(tokens: int) -> None:
    for slot in (-2, 4, 2**31 - 1, -(2**31)):
        with pytest.raises(RuntimeError, match=r"token_slots\[2\]: expected -1 to 3, got"):
            make([0, 1, slot] + [0] * (tokens - 3), 4)
    with pytest.raises(RuntimeError, match="num_slots: expected >= 0, got -1"):
        make([], -1)
