# SPDX-License-Identifier: Apache-2.0
"""Weights where others keep them: stacks of equal shape, arenas beyond 2^31 elements."""

import pytest
import torch

from toppings import reference
from toppings.ops import pack_stacked, slots_from_stacked

from .lora_case import BF16, F32, TOLERANCE, error_of, ops

L, R, K, N = 3, 4, 20, 28
A, B = torch.randn(L, R, K), torch.randn(L, R, N)
Y, X = torch.randn(5, N), torch.randn(5, K)
SCALES = torch.tensor([[1.0, -2.0, 0.5]])
TOKEN_SLOTS = torch.tensor([2, 0, -1, 1, 2], dtype=torch.int32)


def delta_of(ranks: list[int]) -> torch.Tensor:
    result = Y.double()
    for t, i in enumerate(TOKEN_SLOTS.tolist()):
        if i >= 0:
            r = ranks[i]
            v = X[t].double() @ A[i, :r].double().T
            result[t] += SCALES[0, i].item() * v @ B[i, :r].double()
    return result


@pytest.mark.parametrize("ranks", [None, [4, 0, 3], torch.tensor([1, 2, 3])])
def test_stacked(ranks: list[int] | torch.Tensor | None) -> None:
    a, b, slots = slots_from_stacked(A, B, ranks)
    assert a.data_ptr() == A.data_ptr() and b.data_ptr() == B.data_ptr()
    want = delta_of([R] * L if ranks is None else [int(r) for r in ranks])
    args = (Y, X, a, b, slots, SCALES, TOKEN_SLOTS, [N])
    assert error_of(ops.lora_forward(*args), want) < TOLERANCE[F32]
    assert error_of(reference.lora_forward(*args), want) < 1e-12

    packed_a, packed_b, packed_slots = pack_stacked(A, B.transpose(1, 2), ranks)
    assert torch.equal(packed_a, a) and torch.equal(packed_b, b)
    assert torch.equal(packed_slots, slots)


def test_stacks_of_several_projections_are_joined() -> None:
    a, b, slots = slots_from_stacked(A, B)
    both = torch.cat([slots, slots])
    scales = torch.cat([SCALES, SCALES])
    y = torch.cat([Y, Y], dim=1)
    result = ops.lora_forward(y, X, a, b, both, scales, TOKEN_SLOTS, [N, N])
    assert torch.equal(result[:, :N], result[:, N:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((A, B[:2]), r"a, b: expected \[L, R, K\] and \[L, R, N\]"),
        ((A[0], B[0]), r"a, b: expected \[L, R, K\] and \[L, R, N\]"),
        ((A.transpose(0, 1).contiguous().transpose(0, 1), B), "a, b: expected contiguous"),
        ((A, B, [1, 2]), r"ranks: expected 3 of them, got \[2\]"),
        ((A, B, [1, 2, 5]), "ranks: expected each from 0 to 4"),
        ((A, B, [1, -1, 2]), "ranks: expected each from 0 to 4"),
    ],
)
def test_stacks_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slots_from_stacked(*arguments)


def test_offsets_beyond_31_bits() -> None:
    try:  # pages that nobody touches take no memory
        arena = torch.empty(2**32 + 2**20, dtype=BF16)
    except RuntimeError:
        pytest.skip("no 8 GB of address space")
    size = R * (K + N)
    slots = torch.zeros(1, L, 3, dtype=torch.int64)
    for i, begin in enumerate((0, 2**31 + 3, 2**32 + 7)):
        arena[begin : begin + R * K] = A[i].flatten()
        arena[begin + R * K : begin + size] = B[i].flatten()
        slots[0, i] = torch.tensor([begin, begin + R * K, R])
    args = (Y, X, arena, arena, slots, SCALES, TOKEN_SLOTS, [N])
    assert error_of(ops.lora_forward(*args), reference.lora_forward(*args)) < TOLERANCE[F32]
