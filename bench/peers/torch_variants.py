# SPDX-License-Identifier: Apache-2.0
"""What one writes in plain torch. Tokens come sorted, so that rows are slices and not gathered."""

from __future__ import annotations

import torch
from cases import Case
from inputs import Inputs
from torch import Tensor

from peers.interface import Run

Part = tuple[Tensor, Tensor, Tensor, Tensor, float]  # x [t, K], y [t, N], A [r, K], B [r, N], scale


def make_parts(inputs: Inputs, call: int) -> list[Part]:
    """One for each adapter in use; x and y are views of the sorted tokens."""
    parts = []
    adapters = inputs.adapters(call)
    for segment in inputs.segments:
        adapter, rows = adapters[segment.local], slice(segment.start, segment.stop)
        parts.append(
            (inputs.x_sorted[rows], inputs.y_sorted[rows], adapter.a, adapter.b, adapter.scale)
        )
    return parts


class _TorchPeer:
    version = torch.__version__
    sorted = True

    def supports(self, case: Case) -> bool:
        return True


class Loop(_TorchPeer):
    name = "torch loop"

    def prepare(self, inputs: Inputs) -> Run:
        calls = [make_parts(inputs, call) for call in range(inputs.sets)]

        def run(call: int) -> None:
            for x, y, a, b, scale in calls[call]:
                y += scale * (x @ a.T) @ b

        return run


class Addmm(_TorchPeer):
    """The sum is left to the GEMM."""

    name = "torch addmm"

    def prepare(self, inputs: Inputs) -> Run:
        calls = [make_parts(inputs, call) for call in range(inputs.sets)]

        def run(call: int) -> None:
            for x, y, a, b, scale in calls[call]:
                y.addmm_(x @ a.T, b, alpha=scale)

        return run


class Bmm(_TorchPeer):
    """Weights gathered from stacks padded to the largest rank, two batched products, one sum.

    Equal segments gather an adapter once; unequal ones gather it for every token.
    """

    name = "gather + bmm"

    def supports(self, case: Case) -> bool:
        """A prompt of one adapter has nothing to gather: that would copy it for nothing."""
        return case.adapters > 1 or case.tokens == 1

    def prepare(self, inputs: Inputs) -> Run:
        pool, case = inputs.pool, inputs.case
        lengths = {segment.stop - segment.start for segment in inputs.segments}
        length = lengths.pop() if len(lengths) == 1 else 1
        local = inputs.local[inputs.order][::length]
        stacked_a, stacked_b = pool.stacked_a, pool.stacked_b
        scales = torch.tensor([adapter.scale for adapter in pool.adapters]).to(pool.dtype)
        scales = scales[:, None, None]
        indices = [call * case.adapters + local for call in range(inputs.sets)]
        x = inputs.x_sorted.view(len(local), length, -1)
        y = inputs.y_sorted.view(len(local), length, -1)

        def run(call: int) -> None:
            index = indices[call]
            v = torch.bmm(x, stacked_a[index].transpose(1, 2)).mul_(scales[index])
            y.add_(torch.bmm(v, stacked_b[index]))

        return run
