# SPDX-License-Identifier: Apache-2.0
"""Every operator against the float64 oracle: all levels, all dtypes, hostile shapes."""

from functools import cache
from itertools import product

import pytest
import torch

from toppings import reference

from .lora_case import (
    BF16,
    DTYPES,
    F16,
    F32,
    RANKS,
    TOLERANCE,
    Case,
    Inputs,
    error_of,
    ops,
    same_bits,
)

# T, K, widths and the rest; each runs with every dtype at every level.
SHAPES = [
    (0, 64, (64,), {}),
    (1, 577, (33,), {"ranks": (256,)}),
    (1, 64, (5, 130), {"ranks": (3,), "y_scale": 0.0}),
    (
        1,
        40,
        (8203,),
        {"ranks": (11,)},
    ),  # columns in two parts, as below
    (5, 40, (1701,), {"users": "one", "ranks": (9,)}),
    (2, 33, (577, 1), {"absent": True}),
    (7, 1, (5, 130), {"users": "skewed"}),
    (7, 96, (65,), {"users": "one", "y_scale": 0.0}),
    (64, 128, (64, 32, 32), {"absent": True, "strided": False}),
    (65, 577, (97, 33), {"users": "skewed"}),
    (513, 95, (66,), {"y_scale": 0.0}),
]


def cases() -> list[Case]:
    weights = [(dtype, dtype) for dtype in DTYPES] + [(F32, BF16), (F16, F32)]
    return [
        Case(n, tokens, width_in, widths, dtype, a_dtype, b_dtype, **rest)
        for n, (dtype, (a_dtype, b_dtype), (tokens, width_in, widths, rest)) in enumerate(
            product(DTYPES, weights, SHAPES)
        )
    ]


@cache
def made(case: Case) -> tuple[Inputs, torch.Tensor]:
    inputs = case.make()
    return inputs, inputs.expected()


def name(case: Case) -> str:
    dtypes = (
        str(dtype).removeprefix("torch.") for dtype in (case.dtype, case.a_dtype, case.b_dtype)
    )
    return f"{'-'.join(dtypes)}-T{case.tokens}-K{case.width_in}-N{'+'.join(map(str, case.widths))}"


@pytest.mark.parametrize("case", cases(), ids=name)
def test_forward(case: Case, level: str) -> None:
    inputs, want = made(case)
    before = inputs.y_buffer.clone()
    result = inputs.forward()
    assert result.dtype == case.dtype and result.shape == inputs.y.shape, case
    assert same_bits(inputs.y_buffer, before), (case, "lora_forward changed y")
    assert error_of(result, want) <= TOLERANCE[case.dtype], (case, error_of(result, want))

    idle = inputs.token_slots < 0
    assert same_bits(result[idle], inputs.y[idle]), (case, "a row without an adapter changed")

    y_buffer = before.clone()
    y = y_buffer.as_strided(inputs.y.shape, inputs.y.stride(), inputs.y.storage_offset())
    ops.lora_forward_(y, *inputs.args()[1:])
    assert same_bits(y, result), (case, "in place differs")
    y.copy_(inputs.y)
    assert same_bits(y_buffer, before), (case, "memory around y changed")


@pytest.mark.parametrize("case", cases()[::2], ids=name)
def test_shrink_and_expand(case: Case, level: str) -> None:
    inputs, want = made(case)
    v = ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 300)
    v_want = reference.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 300)
    assert v.dtype == F32 and v.shape == v_want.shape, case
    assert error_of(v, v_want) <= TOLERANCE[F32], (case, error_of(v, v_want))
    assert not v[v_want == 0].any(), (case, "columns beyond the rank or rows without an adapter")
    y = inputs.y.clone()
    ops.lora_expand_(y, v, inputs.b, inputs.slots, inputs.scales, inputs.token_slots, inputs.widths)
    assert error_of(y, want) <= TOLERANCE[case.dtype], (case, error_of(y, want))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_alone(rank: int, dtype: torch.dtype, level: str) -> None:
    for tokens in (1, 2, 3, 5, 6, 12, 25):
        case = Case(
            rank, tokens, 70, (131,), dtype, dtype, dtype, ranks=(rank,), users="one", y_scale=0.0
        )
        inputs = case.make()
        error = error_of(inputs.forward(), inputs.expected())
        assert error <= TOLERANCE[dtype], (case, error)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


def unit_product(b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 + 1 * (1 * 1) * b in `dtype`: what reading b and writing y alone do to a number."""
    one = torch.ones(1)
    y, x = torch.zeros(1, len(b), dtype=dtype), torch.ones(1, 1, dtype=dtype)
    slots = torch.tensor([[[0, 0, 1]]])
    ops.lora_forward_(y, x, one, b, slots, one[None], torch.zeros(1, dtype=torch.int32), [len(b)])
    return y[0]


def assert_same_numbers(got: torch.Tensor, want: torch.Tensor) -> None:
    """NaN equals NaN; -0 equals 0, as 0 + -0 is 0."""
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0, posinf=None), want.nan_to_num(nan=0.0, posinf=None))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_16_bit_weight_is_read_exactly(dtype: torch.dtype, level: str) -> None:
    b = every_value(dtype)[:-1]  # an odd number of them: tails too
    assert_same_numbers(unit_product(b, F32), b.float())


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_y_is_rounded_to_nearest_even(dtype: torch.dtype, level: str) -> None:
    generator = torch.Generator().manual_seed(1)
    every = every_value(dtype).float()
    ties = torch.stack([every[:-1], every[1:]]).double().mean(dim=0).float()
    random = torch.randint(-(2**31), 2**31, (100_001,), generator=generator).to(torch.int32)
    b = torch.cat([ties, torch.nextafter(ties, torch.tensor(torch.inf)), random.view(F32)])
    assert_same_numbers(unit_product(b, dtype), b.to(dtype))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_adding_zero_changes_no_number(dtype: torch.dtype, level: str) -> None:
    """All weights of y's dtype: the kernel that works on pairs of bf16 rounds on its own."""
    y = every_value(dtype)[None, :-1].clone()
    x, b = torch.zeros(1, 2, dtype=dtype), torch.ones(3 * y.shape[1], dtype=dtype)
    slots, scales = torch.tensor([[[0, 0, 3]]]), torch.ones(1, 1)
    result = ops.lora_forward(
        y, x, b, b, slots, scales, torch.zeros(1, dtype=torch.int32), [y.shape[1]]
    )
    if dtype == BF16 and level == "avx512_bf16":  # documented: subnormal ones become 0
        y[y.abs() < torch.finfo(dtype).tiny] = 0
    assert_same_numbers(result, y)
