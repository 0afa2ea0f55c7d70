# SPDX-License-Identifier: Apache-2.0
"""The CPU's tests of accuracy, determinism and registration again, on a GPU."""

import pytest
import torch

from .lora_case import TOLERANCE, Case, error_of, ops, same_bits
from .test_accuracy import cases, name
from .test_cuda import needs_gpu, on_gpu
from .test_determinism import DTYPES, KINDS
from .test_registration import CASES, dir_of_ops, model

pytestmark = needs_gpu
DETERMINISM = [
    Case(7, *shape, dtype, weight_dtype, weight_dtype, **rest)
    for shape, rest in KINDS.values()
    for dtype, weight_dtype in DTYPES
]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("case", cases(), ids=name)
def test_accuracy(case: Case, aligned: bool) -> None:
    case = case.on_16_bytes() if aligned else case
    cpu = case.make()
    inputs = on_gpu(cpu, aligned)
    result = inputs.forward(max_rank=max(case.ranks))
    error = error_of(result.cpu(), cpu.expected())
    assert error <= TOLERANCE[case.dtype], (case, error)
    idle = inputs.token_slots < 0
    assert same_bits(result[idle], inputs.y[idle]), (case, "a row without an adapter changed")


@pytest.mark.parametrize("case", DETERMINISM, ids=name)
def test_determinism(case: Case) -> None:
    inputs = on_gpu(case.make())
    whole = inputs.forward()
    assert same_bits(inputs.forward(inputs.plan()), whole), case
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(3)).cuda()
    assert same_bits(inputs.rows(order).forward(), whole[order]), case
    for count in (1, 5, 17):
        parts = torch.arange(case.tokens, device="cuda").split(count)
        result = torch.cat([inputs.rows(part).forward() for part in parts])
        assert same_bits(result, whole), (case, count)
    alone = torch.full_like(inputs.token_slots, -1)
    alone[0] = inputs.token_slots[0]
    result = inputs.with_token_slots(alone).forward()
    assert same_bits(result[0], whole[0]) and same_bits(result[1:], inputs.y[1:]), case


@pytest.mark.parametrize("with_plan", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case.tokens}")
def test_opcheck(case: Case, with_plan: bool) -> None:
    inputs = on_gpu(case.make())
    plan = inputs.plan() if with_plan else None
    y, x, a, b, slots, scales, token_slots, widths, _, _ = inputs.args()
    v = ops.lora_shrink(x, a, slots, token_slots, 16)
    calls = {
        "lora_forward": inputs.args(plan),
        "lora_forward_": inputs.args(plan),
        "lora_shrink": (x, a, slots, token_slots, 16, plan),
        "lora_expand_": (y, v, b, slots, scales, token_slots, widths, plan),
        "lora_plan": (token_slots, slots.shape[1]),
    }
    for operator in dir_of_ops():
        torch.library.opcheck(getattr(ops, operator).default, calls[operator])


def test_compile() -> None:
    args = on_gpu(CASES[0].make()).args()[:8]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(*args), model(*args)), CASES[0]


def test_no_tokens() -> None:
    inputs = on_gpu(Case(8, 0, 64, (64,), *[torch.bfloat16] * 3).make())
    assert inputs.forward().shape == (0, 64)
