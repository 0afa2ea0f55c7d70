# SPDX-License-Identifier: Apache-2.0
"""What torch expects of an operator: schema, fake kernel, torch.compile."""

import pytest
import torch

from toppings import cpu

from .lora_case import BF16, F16, F32, Case, Inputs, ops, same_bits

CASES = [
    Case(1, 5, 33, (17, 64), BF16, BF16, BF16, ranks=(3, 8), absent=True),
    Case(2, 1, 64, (64,), F16, F32, BF16, ranks=(16,), users="one", strided=False),
    Case(3, 0, 8, (8,), F32, F32, F32, ranks=(4,)),
]


@pytest.fixture(params=CASES, ids=lambda case: f"T{case.tokens}")
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return request.param.make()


def test_schemas() -> None:
    tail = "Tensor slots, Tensor scales, Tensor token_slots, int[] widths, Tensor? plan=None"
    middle = f"Tensor x, Tensor a, Tensor b, {tail}, int max_rank=512"
    assert [str(getattr(ops, name).default._schema) for name in dir_of_ops()] == [
        f"toppings::lora_forward(Tensor y, {middle}) -> Tensor",
        f"toppings::lora_forward_(Tensor(a!) y, {middle}) -> ()",
        "toppings::lora_shrink(Tensor x, Tensor a, Tensor slots, Tensor token_slots, int max_rank, "
        "Tensor? plan=None) -> Tensor",
        f"toppings::lora_expand_(Tensor(a!) y, Tensor v, Tensor b, {tail}) -> ()",
        "toppings::lora_plan(Tensor token_slots, int num_slots) -> Tensor",
    ]


def dir_of_ops() -> list[str]:
    return ["lora_forward", "lora_forward_", "lora_shrink", "lora_expand_", "lora_plan"]


@pytest.mark.parametrize("with_plan", [False, True])
def test_opcheck(inputs: Inputs, with_plan: bool) -> None:
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
    for name in dir_of_ops():
        torch.library.opcheck(getattr(ops, name).default, calls[name])


def model(y: torch.Tensor, x: torch.Tensor, *rest) -> torch.Tensor:
    """A layer as an engine would write it: both forms, a plan, operators of torch around them."""
    a, b, slots, scales, token_slots, widths = rest
    plan = ops.lora_plan(token_slots, slots.shape[1])
    result = ops.lora_forward(y + 1, x, a, b, slots, scales, token_slots, widths, plan) * 2
    ops.lora_forward_(result, x, a, b, slots, scales, token_slots, widths, plan)
    v = ops.lora_shrink(x, a, slots, token_slots, 16, plan)
    ops.lora_expand_(result, v, b, slots, scales, token_slots, widths, plan)
    return result + 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    args = CASES[0].make().args()[:8]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert same_bits(compiled(*args), model(*args)), CASES[0]


def only_ours(*args) -> torch.Tensor:
    """Nothing that inductor would compile C++ for, which takes it 20 seconds."""
    result = ops.lora_forward(*args)
    ops.lora_forward_(result, *args[1:])
    return result


def test_inductor() -> None:
    args = CASES[0].make().args()[:8]
    torch._dynamo.reset()
    compiled = torch.compile(only_ours, backend="inductor", fullgraph=True)
    assert same_bits(compiled(*args), only_ours(*args)), CASES[0]


def test_levels() -> None:
    assert cpu.supported_levels()[-1] == "generic"
    assert cpu.level() in cpu.supported_levels()
    with pytest.raises(ValueError, match="level: expected one of .*, got 'sse'"):
        cpu.set_level("sse")
