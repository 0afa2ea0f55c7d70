# SPDX-License-Identifier: Apache-2.0
"""PEFT's own lora.Linear with one adapter name per token: its mixed-batch forward.

The base layer is replaced by one that returns y, so neither the base GEMM nor a copy is timed, and
PEFT adds to y in place as the others do.
"""

from __future__ import annotations

import peft
from cases import Case
from inputs import Inputs, Pool, huge
from peft.tuners.lora import Linear, LoraConfig
from torch import Tensor, nn

from peers.interface import Run


class ReturnY(nn.Module):
    y: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.y


class PeftLayer:
    name = "PEFT"
    version = peft.__version__
    sorted = False

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._layer: Linear | None = None

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> Run:
        if self._pool is not inputs.pool:
            self._pool, self._layer = inputs.pool, make_layer(inputs.pool)
        layer, base, x = self._layer, ReturnY(), inputs.x
        base.y = inputs.y
        layer.base_layer = base
        firsts = range(0, inputs.sets * inputs.case.adapters, inputs.case.adapters)
        names = [[f"{first + i}" for i in inputs.local.tolist()] for first in firsts]

        def run(call: int) -> None:
            layer(x, adapter_names=names[call])

        return run


def make_layer(pool: Pool) -> Linear:
    """PEFT builds the layer with its first adapter; the others are put beside it by hand, because
    update_layer() takes milliseconds for each.
    """
    base = nn.Linear(pool.width_in, pool.width_out, bias=False, dtype=pool.dtype, device="meta")
    config = LoraConfig(r=pool.ranks[0], lora_alpha=pool.ranks[0], init_lora_weights=False)
    layer = Linear(base, "0", config=config, r=pool.ranks[0], lora_alpha=pool.ranks[0])
    size = sum(pool.ranks) * pool.width_out
    memory, start = huge(size, dtype=pool.dtype), 0  # PEFT keeps B as [N, r]
    for i, adapter in enumerate(pool.adapters):
        rank = len(adapter.a)
        b = memory[start : start + rank * pool.width_out].view(pool.width_out, rank)
        b.copy_(adapter.b.T)
        start += rank * pool.width_out
        name = f"{i}"
        layer.lora_A[name] = _linear(adapter.a)
        layer.lora_B[name] = _linear(b)
        layer.lora_dropout[name] = nn.Identity()
        layer.scaling[name] = adapter.scale
    return layer.eval()


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
