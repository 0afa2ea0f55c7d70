# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU. Without one only their registration is tested; the kernels' logic is
tested on the CPU in tests/cuda_sim."""

from dataclasses import fields, replace

import pytest
import torch

from toppings import _runtime

from .lora_case import BF16, DTYPES, F16, F32, TOLERANCE, Case, Inputs, error_of, ops, same_bits

OPERATORS = ("lora_forward", "lora_forward_", "lora_shrink", "lora_expand_", "lora_plan")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_all_operators_are_registered_where_the_library_holds_kernels() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = {has_kernel(f"toppings::{name}", "CUDA") for name in OPERATORS}
    assert registered == {_runtime.built_with_cuda()}


@needs_gpu
def test_the_library_holds_kernels() -> None:
    assert _runtime.built_with_cuda()


def is_aligned(inputs: Inputs) -> bool:
    """Whether every row of x and y and every block of A and B is on 16 bytes."""
    places = [inputs.slots[..., 0] * inputs.a.itemsize, inputs.slots[..., 1] * inputs.b.itemsize]
    bases = [inputs.a.data_ptr(), inputs.b.data_ptr()]
    for rows in (inputs.x, inputs.y):
        places.append(torch.tensor(rows.stride(0) * rows.itemsize))
        bases.append(rows.data_ptr())
    return all((place % 16 == 0).all() for place in places) and all(b % 16 == 0 for b in bases)


def on_gpu(inputs: Inputs, aligned: bool = False) -> Inputs:
    """The same, y still a view of the buffer with NaN around it; so is x where it isn't aligned."""
    moved = {
        field.name: value.cuda()
        for field in fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor)
    }
    y = moved["y_buffer"].as_strided(inputs.y.shape, inputs.y.stride(), inputs.y.storage_offset())
    x = moved["x"]
    if not aligned:
        x = torch.nn.functional.pad(x, (1, 2), value=torch.nan)[:, 1:-2]
    result = replace(inputs, **{**moved, "y": y, "x": x})
    assert not aligned or is_aligned(result)
    return result


SHAPES = [
    (0, 64, (64,), {}),
    (1, 4096, (4096, 1024, 1024), {"ranks": (16,), "strided": False}),
    (7, 577, (65, 130), {}),
    (64, 2048, (1024, 256), {"absent": True}),
    (256, 1000, (97,), {"users": "skewed"}),
    (300, 577, (97, 33), {}),
    (3000, 512, (640,), {"users": "skewed"}),
    # 8 KiB of v for each token at max_rank 512: 8192 tokens fit a window, so there are two.
    (9000, 64, (64, 8, 33, 16), {"ranks": (4,)}),
    (20, 192, (33, 8, 64, 1, 40, 16, 7, 96, 24, 48), {"ranks": (0, 5, 16)}),  # two launches
]
WEIGHTS = [(dtype, dtype, dtype) for dtype in DTYPES] + [(BF16, F32, F32), (F16, BF16, F32)]


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", WEIGHTS, ids=str)
@pytest.mark.parametrize("with_plan", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_accuracy(shape: tuple, dtypes: tuple, with_plan: bool, aligned: bool) -> None:
    tokens, width_in, widths, rest = shape
    case = Case(tokens, tokens, width_in, widths, *dtypes, **rest)
    case = case.on_16_bytes() if aligned else case
    cpu = case.make()
    want = cpu.expected()
    inputs = on_gpu(cpu, aligned)
    before = inputs.y_buffer.clone()
    plan = inputs.plan() if with_plan else None
    if plan is not None:
        assert torch.equal(plan.cpu(), cpu.plan()), case
    result = inputs.forward(plan)
    assert same_bits(inputs.y_buffer, before), case
    assert error_of(result.cpu(), want) <= TOLERANCE[case.dtype], case
    assert all(same_bits(inputs.forward(plan), result) for _ in range(3)), case

    ops.lora_forward_(*inputs.args(plan))
    assert same_bits(inputs.y, result), case
    inputs.y.copy_(cpu.y)
    assert same_bits(inputs.y_buffer, before), (case, "memory around y changed")

    v = ops.lora_shrink(inputs.x, inputs.a, inputs.slots, inputs.token_slots, 300, plan)
    y = inputs.y.clone()
    rest_args = (inputs.slots, inputs.scales, inputs.token_slots, inputs.widths, plan)
    ops.lora_expand_(y, v, inputs.b, *rest_args)
    assert error_of(y.cpu(), want) <= TOLERANCE[case.dtype], case


@needs_gpu
def test_bits_do_not_depend_on_the_batch() -> None:
    case = Case(3, 2000, 700, (300,), BF16, BF16, BF16, users="skewed", strided=False)
    inputs = on_gpu(case.make())
    whole = inputs.forward()
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(3)).cuda()
    assert same_bits(inputs.rows(order).forward(), whole[order]), case
    for count in (1, 17, 200, 900):
        part = inputs.rows(order[:count])
        assert same_bits(part.forward(), whole[order[:count]]), (case, count)


@needs_gpu
def test_a_graph_is_replayed_with_other_slots() -> None:
    case = Case(4, 9, 256, (128, 64), F16, F16, F16, strided=False)
    inputs = on_gpu(case.make())
    others = [torch.roll(inputs.token_slots, shift) for shift in range(1, 5)]
    graph = torch.cuda.CUDAGraph()
    y = inputs.y.clone()
    with torch.cuda.graph(graph):
        y.copy_(inputs.y)
        for _ in range(3):
            ops.lora_forward_(y, *inputs.args()[1:])
    for token_slots in others:
        inputs.token_slots.copy_(token_slots)
        graph.replay()
        want = inputs.y.clone()
        for _ in range(3):
            ops.lora_forward_(want, *inputs.args()[1:])
        assert same_bits(y, want), case


@needs_gpu
def test_streams_do_not_disturb_each_other() -> None:
    case = Case(5, 64, 1024, (512,), F32, F32, F32, strided=False)
    inputs = on_gpu(case.make())
    want = inputs.forward()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(inputs.forward())
    torch.cuda.synchronize()
    assert all(same_bits(result, want) for result in results)


@needs_gpu
def test_other_devices_are_refused() -> None:
    inputs = on_gpu(Case(6, 3, 8, (8,), F32, F32, F32, strided=False).make())
    with pytest.raises(RuntimeError, match="a: expected a tensor on cuda:0"):
        replace(inputs, a=inputs.a.cpu()).forward()
