# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton operators, in the order of PunicaWrapperGPU.add_lora_linear.

A float32 buffer, lora_shrink, lora_expand; metadata from LoRAKernelMeta, made beforehand. Ranks are
padded to the largest, scales folded into B, as vLLM does when it loads an adapter. The number of
slots is the number of adapters in use: vLLM's grid grows with it.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import torch
from torch import Tensor

from gpu.cases import Case
from gpu.inputs import Inputs
from gpu.peers.interface import Absent, Run

FOLDER = "vllm.lora.ops.triton_ops"
CACHES = ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT")


def find_vllm() -> VllmTriton | Absent:
    try:
        version = importlib.import_module("vllm").__version__
        operators = importlib.import_module(FOLDER)
        caches = importlib.import_module(f"{FOLDER}.utils")
        return VllmTriton(operators, caches, version)
    except Exception as error:  # whatever its import of so much else may raise
        return Absent.because("vLLM", error)


class VllmTriton:
    name = "vLLM"
    sorted = False

    def __init__(self, operators: ModuleType, caches: ModuleType, version: str) -> None:
        self.version = version
        self._shrink, self._expand = operators.lora_shrink, operators.lora_expand
        self._meta = operators.LoRAKernelMeta
        self._caches = [getattr(caches, name) for name in CACHES]

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> Run:
        for cache in self._caches:
            cache.clear()  # by address: another case's tensors may have been there
        meta = make_meta(self._meta, inputs)
        b = [fold_scales(inputs, stacked) for stacked in inputs.stacked_b]
        calls = [
            ([a[call][:, None] for a in inputs.stacked_a], [part[call][:, None] for part in b])
            for call in range(inputs.calls)
        ]
        shape = (len(inputs.slices), inputs.case.tokens, inputs.max_rank)

        def run(call: int) -> None:
            a, b = calls[call]
            buffer = torch.empty(shape, dtype=torch.float32, device=inputs.device)
            self._shrink(inputs.x[call], a, buffer, *meta, 1.0)
            self._expand(buffer, b, inputs.y[call], *meta, offset_start=0, add_inputs=True)

        return run


def make_meta(kind: type, inputs: Inputs) -> tuple:
    """The arguments that both operators take between their tensors and their numbers."""
    tokens, adapters = inputs.case.tokens, inputs.case.adapters
    meta = kind.make(adapters, tokens, inputs.device)
    meta.prepare_tensors(inputs.token_slots)
    takes_flag = "specialize_active_lora" in inspect.signature(meta.meta_args).parameters
    return meta.meta_args(tokens, True) if takes_flag else meta.meta_args(tokens)


def fold_scales(inputs: Inputs, stacked: Tensor) -> Tensor:
    """[calls, adapters, N, max r]"""
    scales = inputs.scales.to(stacked.dtype)[:, :, None, None]
    return (stacked * scales).transpose(2, 3).contiguous()
