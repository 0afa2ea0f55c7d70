# SPDX-License-Identifier: Apache-2.0
"""torch.ops.toppings.lora_forward_: tokens in any order, the plan made beforehand."""

from __future__ import annotations

import torch
from cases import Case
from inputs import Inputs

import toppings
from peers.interface import Run


class ToppingsOperator:
    name = "toppings"
    version = toppings.__version__
    sorted = False

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> Run:
        calls = [operator_arguments(inputs, call) for call in range(inputs.sets)]
        operator = torch.ops.toppings.lora_forward_.default

        def run(call: int) -> None:
            operator(*calls[call])

        return run


def operator_arguments(inputs: Inputs, call: int) -> tuple:
    """Of lora_forward_; the slot table holds the adapters of this call."""
    pool, adapters = inputs.pool, inputs.adapters(call)
    token_slots = inputs.local.int()
    plan = torch.ops.toppings.lora_plan(token_slots, len(adapters))
    slots = [(adapter.a_start, adapter.b_start, len(adapter.a)) for adapter in adapters]
    scales = [adapter.scale for adapter in adapters]
    return (
        *(inputs.y, inputs.x, pool.memory, pool.memory),
        *(torch.tensor([slots]), torch.tensor([scales]), token_slots),
        *([inputs.case.width_out], plan, pool.max_rank),
    )
