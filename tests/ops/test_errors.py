# SPDX-License-Identifier: Apache-2.0
"""A wrong argument is refused at the door, by name, and y stays as it was."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from .lora_case import BF16, F16, Case, Inputs, ops, same_bits

CASE = Case(5, 6, 32, (16, 24), BF16, BF16, BF16, ranks=(2, 4), users="one", strided=False)


def entry(inputs: Inputs, column: int, value: int) -> Inputs:
    """One number of projection 1's entry for the slot in use."""
    slots = inputs.slots.clone()
    slots[1, 1, column] = value
    return replace(inputs, slots=slots)


def slot_of_last(inputs: Inputs, slot: int) -> Inputs:
    token_slots = inputs.token_slots.clone()
    token_slots[-1] = slot
    return replace(inputs, token_slots=token_slots)


def overlapping(inputs: Inputs) -> Inputs:
    buffer = torch.zeros(6, 60, dtype=BF16)
    return replace(inputs, x=buffer[:, :32], y=buffer[:, 20:])


def broadcast(y: torch.Tensor) -> torch.Tensor:
    return y[:1].expand_as(y)


ERRORS: list[tuple[str, Callable[[Inputs], Inputs]]] = [
    ("y: expected float32|x: expected the dtype of y", lambda i: replace(i, y=i.y.double())),
    ("x: expected the dtype of y", lambda i: replace(i, x=i.x.to(F16))),
    ("x: expected float32, float16 or bfloat16", lambda i: replace(i, x=i.x.int(), y=i.y.int())),
    ("x: expected 2 dimensions, got 1", lambda i: replace(i, x=i.x[0])),
    ("x: expected size 6 in dimension 0, got 5", lambda i: replace(i, x=i.x[:5])),
    ("x: expected a contiguous last dimension", lambda i: replace(i, x=i.x.T.contiguous().T)),
    ("in: expected >= 1, got 0", lambda i: replace(i, x=i.x[:, :0])),
    ("y: expected size 40 in dimension 1", lambda i: replace(i, y=i.y[:, :39])),
    ("widths: expected 2 of them", lambda i: replace(i, widths=[40])),
    ("width: expected >= 1, got 0", lambda i: replace(i, widths=[40, 0])),
    ("a: expected 1 dimensions, got 2", lambda i: replace(i, a=i.a[None])),
    ("a: expected float32, float16 or bfloat16", lambda i: replace(i, a=i.a.to(torch.int16))),
    ("b: expected a contiguous tensor", lambda i: replace(i, b=i.b[::2])),
    ("slots: expected int64", lambda i: replace(i, slots=i.slots.int())),
    ("slots: expected 3 dimensions, got 2", lambda i: replace(i, slots=i.slots[0])),
    ("slots: expected size 3 in dimension 2, got 2", lambda i: replace(i, slots=i.slots[..., :2])),
    ("scales: expected float32", lambda i: replace(i, scales=i.scales.double())),
    ("scales: expected size 2 in dimension 1", lambda i: replace(i, scales=i.scales[:, :1])),
    ("token_slots: expected int32", lambda i: replace(i, token_slots=i.token_slots.long())),
    (r"token_slots\[5\]: expected -1 to 1, got 2", lambda i: slot_of_last(i, 2)),
    (r"token_slots\[5\]: expected -1 to 1, got -2", lambda i: slot_of_last(i, -2)),
    (r"slots\[1, 1\]: expected a rank from 0 to max_rank 512, got -1", lambda i: entry(i, 2, -1)),
    (r"slots\[1, 1\]: expected a rank from 0 to max_rank 512, got 513", lambda i: entry(i, 2, 513)),
    (r"slots\[1, 1\]: expected 400 x 32 elements within .* of a", lambda i: entry(i, 2, 400)),
    (r"slots\[1, 1\]: expected 4 x 32 .* of a, got offset -1", lambda i: entry(i, 0, -1)),
    (r"slots\[1, 1\]: .* of a, got offset 9223372036854775807", lambda i: entry(i, 0, 2**63 - 1)),
    (r"slots\[1, 1\]: expected 4 x 24 .* of b", lambda i: entry(i, 1, i.b.numel() - 4 * 24 + 1)),
]

# lora_forward writes to new memory and takes a y like these.
IN_PLACE_ERRORS: list[tuple[str, Callable[[Inputs], Inputs]]] = [
    ("y: expected a contiguous last dimension", lambda i: replace(i, y=i.y.T.contiguous().T)),
    ("y_stride: expected >= 40, got 0", lambda i: replace(i, y=broadcast(i.y))),
    ("x: expected memory of its own, got memory that overlaps y", overlapping),
]


@pytest.mark.parametrize(("message", "change"), IN_PLACE_ERRORS, ids=lambda p: str(p)[:30])
def test_refused_in_place(message: str, change: Callable[[Inputs], Inputs]) -> None:
    inputs = change(CASE.make())
    before = inputs.y.clone()
    with pytest.raises(RuntimeError, match=message):
        ops.lora_forward_(*inputs.args())
    assert same_bits(inputs.y, before)
    assert same_bits(inputs.forward(), replace(inputs, y=before, x=inputs.x.clone()).forward())


@pytest.mark.parametrize(("message", "change"), ERRORS, ids=[message for message, _ in ERRORS])
def test_refused(message: str, change: Callable[[Inputs], Inputs]) -> None:
    inputs = change(CASE.make())
    before = inputs.y.clone()
    for op in (ops.lora_forward, ops.lora_forward_):
        with pytest.raises(RuntimeError, match=message):
            op(*inputs.args())
    assert torch.equal(inputs.y.nan_to_num(), before.nan_to_num())


def test_only_slots_in_use_are_looked_at() -> None:
    inputs = CASE.make()
    slots = inputs.slots.clone()
    slots[:, 0] = -(2**62)
    assert same_bits(replace(inputs, slots=slots).forward(), inputs.forward())


def test_max_rank() -> None:
    inputs = CASE.make()
    with pytest.raises(RuntimeError, match="a rank from 0 to max_rank 3, got 4"):
        inputs.forward(max_rank=3)
    assert same_bits(inputs.forward(max_rank=4), inputs.forward())
    with pytest.raises(RuntimeError, match="a rank from 0 to max_rank 3, got 4"):
        ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 3)
    with pytest.raises(RuntimeError, match="max_rank: expected >= 0, got -1"):
        ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, -1)


def test_v_of_another_shape() -> None:
    inputs = CASE.make()
    v = ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 4)
    rest = (inputs.b, inputs.slots, inputs.scales, inputs.token_slots, inputs.widths)
    for wrong, message in [
        (v[:1], "v: expected size 2 in dimension 0, got 1"),
        (v[:, :5], "v: expected size 6 in dimension 1, got 5"),
        (v[..., :3].contiguous(), "a rank from 0 to max_rank 3, got 4"),
        (v.to(BF16), "v: expected float32"),
        (v.transpose(0, 1).contiguous().transpose(0, 1), "v: expected a contiguous tensor"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.lora_expand_(inputs.y, wrong, *rest)


def test_x_and_y_side_by_side_in_one_buffer() -> None:
    inputs = CASE.make()
    buffer = torch.zeros(6, 80, dtype=BF16)
    for x_at, y_at in [(0, 32), (40, 0), (48, 8)]:
        x, y = buffer[:, x_at : x_at + 32], buffer[:, y_at : y_at + 40]
        x.copy_(inputs.x)
        y.copy_(inputs.y)
        assert same_bits(replace(inputs, x=x, y=y).forward(), inputs.forward())


def test_rows_of_x_may_share_memory() -> None:
    inputs = CASE.make()
    shared = inputs.x[:1].expand_as(inputs.x)
    result = replace(inputs, x=shared).forward()
    assert same_bits(result, replace(inputs, x=shared.contiguous()).forward())


@pytest.mark.parametrize("position", range(14))
def test_a_plan_of_other_token_slots(position: int) -> None:
    """Every number of a plan counts: none can be changed without notice."""
    inputs = CASE.make().with_token_slots(torch.tensor([1, -1, 0, 1, 1, 0]))
    plan = inputs.plan()
    for value in (-(2**31), -1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1):
        changed = plan.clone()
        changed[position] = value
        unused = plan[position] == -1
        if changed[position] == plan[position] or unused:
            continue
        with pytest.raises(RuntimeError, match="plan: expected the one made from these token_sl"):
            inputs.forward(changed)


def test_plan_of_another_size_or_dtype() -> None:
    inputs = CASE.make()
    with pytest.raises(RuntimeError, match="plan: expected size 14 in dimension 0, got 13"):
        inputs.forward(inputs.plan()[:13])
    with pytest.raises(RuntimeError, match="plan: expected int32"):
        inputs.forward(inputs.plan().long())
