# SPDX-License-Identifier: Apache-2.0
"""What one writes in plain torch. Tokens come sorted, so that rows are slices and not gathered."""

from __future__ import annotations

from itertools import accumulate

import torch

from gpu.cases import Case
from gpu.inputs import Inputs
from gpu.peers.interface import Run


class _TorchPeer:
    version = torch.__version__
    sorted = True

    def supports(self, case: Case) -> bool:
        return True


class Loop(_TorchPeer):
    """For every adapter and projection a GEMM, and a second one that adds to y."""

    name = "torch loop"

    def prepare(self, inputs: Inputs) -> Run:
        scales = inputs.scales.tolist()
        stops = list(accumulate(inputs.lengths))

        def parts(call: int) -> list[tuple]:
            return [
                (
                    inputs.x_sorted[call, stop - length : stop],
                    inputs.y_sorted[call, stop - length : stop, columns],
                    inputs.a(call, s, adapter).T,
                    inputs.b(call, s, adapter),
                    scales[call][adapter],
                )
                for adapter, (length, stop) in enumerate(zip(inputs.lengths, stops, strict=True))
                for s, columns in enumerate(inputs.slices)
            ]

        calls = [parts(call) for call in range(inputs.calls)]

        def run(call: int) -> None:
            for x, y, a, b, scale in calls[call]:
                y.addmm_(x @ a, b, alpha=scale)

        return run


class Bmm(_TorchPeer):
    """Weights gathered from stacks padded to the largest rank, two batched products, one sum.

    Equal segments gather an adapter once; unequal ones gather it for every token.
    """

    name = "gather + bmm"

    def supports(self, case: Case) -> bool:
        """Unequal segments would gather an adapter for each of many tokens."""
        equal = case.tokens % case.adapters == 0
        return equal or case.phase == "decode"

    def prepare(self, inputs: Inputs) -> Run:
        case = inputs.case
        length = inputs.lengths[0] if len(set(inputs.lengths)) == 1 else 1
        index = inputs.token_slots.long()[inputs.order][::length].contiguous()
        x = inputs.x_sorted.view(inputs.calls, len(index), length, -1)
        y = inputs.y_sorted.view(inputs.calls, len(index), length, -1)
        scales = inputs.scales.to(x.dtype)[:, :, None, None]
        weights = list(zip(inputs.stacked_a, inputs.stacked_b, inputs.slices, strict=True))
        assert len(index) * length == case.tokens

        def run(call: int) -> None:
            for a, b, columns in weights:
                v = torch.bmm(x[call], a[call][index].transpose(1, 2)).mul_(scales[call][index])
                y[call][:, :, columns].add_(torch.bmm(v, b[call][index]))

        return run


class GroupedMm(_TorchPeer):
    """torch.nn.functional.grouped_mm twice, padded to the largest rank; nothing is gathered.

    It has no scale and no sum: v is multiplied, the delta added.
    """

    name = "grouped_mm"

    def supports(self, case: Case) -> bool:
        """Rows start at multiples of 16 bytes."""
        widths = (case.site.width_in, max(case.ranks), *case.site.widths)
        return all(width % 8 == 0 for width in widths)

    def prepare(self, inputs: Inputs) -> Run:
        grouped_mm = torch.nn.functional.grouped_mm
        offsets = torch.tensor(list(accumulate(inputs.lengths)), dtype=torch.int32)
        offsets = offsets.to(inputs.device)
        scales = inputs.scales[:, inputs.token_slots.long()[inputs.order]][:, :, None]
        scales = scales.to(inputs.x.dtype)
        weights = list(zip(inputs.stacked_a, inputs.stacked_b, inputs.slices, strict=True))

        def run(call: int) -> None:
            for a, b, columns in weights:
                v = grouped_mm(inputs.x_sorted[call], a[call].transpose(1, 2), offs=offsets)
                delta = grouped_mm(v.mul_(scales[call]), b[call], offs=offsets)
                inputs.y_sorted[call][:, columns].add_(delta)

        return run
