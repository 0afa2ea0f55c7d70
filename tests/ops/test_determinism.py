# SPDX-License-Identifier: Apache-2.0
"""A row's bits depend on the row and its own adapter: not on the batch, the threads or the plan."""

from itertools import product

import pytest
import torch

from .lora_case import BF16, F16, F32, Case, Inputs, ops, same_bits

DTYPES = [(BF16, BF16), (BF16, F32), (F16, F16), (F32, F32)]  # of x, of the weights
KINDS = {
    # Enough work for a parallel region; the second is one segment, split by rank and columns.
    "mixed": ((65, 577, (97, 33)), {"users": "mixed"}),
    "few": ((3, 1025, (1031,)), {"users": "one", "ranks": (100,)}),
    "long": ((130, 321, (290,)), {"users": "skewed", "ranks": (0, 3, 16, 64)}),
}


@pytest.fixture(params=list(product(KINDS, DTYPES)), ids=lambda p: f"{p[0]}-{p[1][0]}-{p[1][1]}")
def case(request: pytest.FixtureRequest) -> Case:
    kind, (dtype, weight_dtype) = request.param
    shape, rest = KINDS[kind]
    return Case(7, *shape, dtype, weight_dtype, weight_dtype, **rest)


@pytest.fixture
def inputs(case: Case) -> Inputs:
    return case.make()


def test_repeating(inputs: Inputs, case: Case, level: str) -> None:
    first = inputs.forward()
    assert all(same_bits(inputs.forward(), first) for _ in range(3)), case


def test_threads(inputs: Inputs, case: Case, level: str, threads) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        v = ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 256)
        y = inputs.y.clone()
        rest = (inputs.slots, inputs.scales, inputs.token_slots, inputs.widths)
        ops.lora_expand_(y, v, inputs.b, *rest)
        results.append((inputs.forward(), v, y))
    for other in results[1:]:
        assert all(map(same_bits, other, results[0])), case


def test_plan(inputs: Inputs, case: Case, level: str) -> None:
    assert same_bits(inputs.forward(inputs.plan()), inputs.forward()), case


def test_permuting_the_batch_permutes_the_result(inputs: Inputs, case: Case, level: str) -> None:
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(3))
    assert same_bits(inputs.rows(order).forward(), inputs.forward()[order]), case


def test_parts_of_the_batch(inputs: Inputs, case: Case, level: str) -> None:
    whole = inputs.forward()
    for count in (1, 2, 5, 17):
        parts = torch.arange(case.tokens).split(count)
        result = torch.cat([inputs.rows(part).forward() for part in parts])
        assert same_bits(result, whole), (case, count)


def test_other_rows_without_their_adapter(inputs: Inputs, case: Case, level: str) -> None:
    whole = inputs.forward()
    for token in range(0, case.tokens, 8):
        alone = torch.full_like(inputs.token_slots, -1)
        alone[token] = inputs.token_slots[token]
        result = inputs.with_token_slots(alone).forward()
        assert same_bits(result[token], whole[token]), (case, token)
        others = torch.arange(case.tokens) != token
        assert same_bits(result[others], inputs.y[others]), (case, token)


def test_forward_is_shrink_then_expand(inputs: Inputs, case: Case, level: str) -> None:
    """More than is promised, but so it is on the CPU while a and b share a dtype."""
    v = ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 300)
    y = inputs.y.clone()
    ops.lora_expand_(y, v, inputs.b, inputs.slots, inputs.scales, inputs.token_slots, inputs.widths)
    assert same_bits(y, inputs.forward()), case
