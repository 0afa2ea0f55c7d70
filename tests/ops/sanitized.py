# SPDX-License-Identifier: Apache-2.0
"""Small calls of every operator and kernel, for compute-sanitizer, with tests/ on PYTHONPATH:

    python -m ops.sanitized [cuda|cpu [few]]

Whatever else would run on the GPU is done on the CPU, because it would be checked too.
"""

import sys
from itertools import product

import torch

from .lora_case import BF16, F16, F32, TOLERANCE, Case, error_of, ops

# Up to 256 tokens: narrow tiles, the plan inside the kernel. Above: wide tiles, a kernel for it.
SHAPES = [(7, 193, (65, 40)), (40, 320, (129,)), (300, 193, (97, 33))]
DTYPES = [(BF16, BF16, BF16), (F16, F16, F16), (F32, F32, F32), (BF16, F32, F32)]
RANKS = (0, 1, 8, 16, 65)
ALL = list(product(SHAPES, DTYPES))
FEW = list(product(SHAPES[1:], ((BF16, BF16, BF16), (F32, F32, F32))))


def check(case: Case, device: str) -> None:
    cpu = case.make()
    want = cpu.expected()
    y, *rest = [
        value.contiguous().to(device) if isinstance(value, torch.Tensor) else value
        for value in cpu.args(max_rank=max(RANKS))
    ]
    x, a, b, slots, scales, token_slots, widths, _, max_rank = rest
    plan = ops.lora_plan(token_slots, len(case.ranks))
    assert torch.equal(plan.cpu(), cpu.plan()), case
    results = []
    for given in (None, plan):
        results.append(ops.lora_forward(y, x, a, b, slots, scales, token_slots, widths, given))
    v = ops.lora_shrink(x, a, slots, token_slots, max_rank, plan)
    ops.lora_expand_(y, v, b, slots, scales, token_slots, widths, plan)
    for result in (*results, y):
        error = error_of(result.cpu(), want)
        assert error <= TOLERANCE[case.dtype], (case, error)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"  # cpu: in the rehearsal
    cases = FEW if sys.argv[2:] == ["few"] else ALL
    for (tokens, *shape), dtypes in cases:
        check(Case(tokens, tokens, *shape, *dtypes, ranks=RANKS, strided=False), device)
    print(f"{len(cases)} cases are right")


if __name__ == "__main__":
    main()
