# SPDX-License-Identifier: Apache-2.0
"""torch.ops.toppings.lora_forward_: tokens in any order, the plan made beforehand."""

from __future__ import annotations

import torch

import toppings
from gpu.cases import Case
from gpu.inputs import Inputs
from gpu.peers.interface import Run


class ToppingsOperator:
    name = "toppings"
    version = toppings.__version__
    sorted = False

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> Run:
        plan = torch.ops.toppings.lora_plan(inputs.token_slots, inputs.case.adapters)
        calls = [
            (*inputs.operator_arguments(call), plan, inputs.max_rank)
            for call in range(inputs.calls)
        ]
        operator = torch.ops.toppings.lora_forward_.default

        def run(call: int) -> None:
            operator(*calls[call])

        return run
