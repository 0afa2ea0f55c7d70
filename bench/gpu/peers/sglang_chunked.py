# SPDX-License-Identifier: Apache-2.0
"""SGLang's chunked SGMV, its default backend, in the order of ChunkedSgmvLoRABackend.

Rows are sorted by adapter and cut into chunks of one adapter each, beforehand; the rows of A of all
projections stand one after another at an adapter's own rank.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from types import ModuleType

import torch
from torch import Tensor

from gpu.cases import Case
from gpu.inputs import DTYPE, Inputs
from gpu.peers.interface import Absent, Run

FOLDERS = ("sglang.kernels.ops.lora.dense", "sglang.srt.lora.triton_ops")  # new, old


def find_sglang() -> SglangChunked | Absent:
    try:
        version = importlib.import_module("sglang").__version__
        info = importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo
        errors = []
        for folder in FOLDERS:
            try:
                return SglangChunked(*_operators(folder), info, version)
            except ImportError as error:
                errors.append(str(error))
        return Absent("SGLang", "; ".join(errors)[:160])
    except Exception as error:  # whatever its import of so much else may raise
        return Absent.because("SGLang", error)


def _operators(folder: str) -> tuple[ModuleType, ModuleType]:
    names = ("chunked_sgmv_shrink", "chunked_sgmv_expand")
    shrink, expand = (importlib.import_module(f"{folder}.{name}") for name in names)
    return shrink, expand


class SglangChunked:
    name = "SGLang"
    sorted = False

    def __init__(self, shrink: ModuleType, expand: ModuleType, info: type, version: str) -> None:
        self.version = version
        self._info = info
        self._shrink = shrink.chunked_sgmv_lora_shrink_forward
        self._expand = expand.chunked_sgmv_lora_expand_forward
        parameters = inspect.signature(self._expand).parameters
        self._takes_host_offsets = "slice_offsets_cpu" in parameters  # then its grid is tighter
        caches = [
            getattr(kernel, "kernel_cache", None)
            for kernel in (*vars(shrink).values(), *vars(expand).values())
        ]
        self._caches = [cache for cache in caches if isinstance(cache, dict)]

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> Run:
        for cache in self._caches:
            cache.clear()  # its key leaves out the rank, which a server never changes
        a, b = pack_a(inputs), torch.cat(inputs.stacked_b, dim=3).transpose(2, 3).contiguous()
        infos = [make_info(self._info, inputs, call) for call in range(inputs.calls)]
        widths = inputs.case.site.widths
        host_offsets = torch.tensor([0, *widths]).cumsum(0).int()
        offsets = host_offsets.to(inputs.device)
        rest = {"slice_offsets_cpu": host_offsets} if self._takes_host_offsets else {}

        def run(call: int) -> None:
            v = self._shrink(inputs.x[call], a[call], infos[call], len(widths))
            y = inputs.y[call]
            self._expand(v, b[call], infos[call], offsets, max(widths), y, **rest)

        return run


def chunk_size(tokens: int) -> int:
    """As the backend chooses it where it may take any."""
    return 128 if tokens >= 256 else 32 if tokens >= 64 else 16


def make_info(kind: type, inputs: Inputs, call: int) -> object:
    size = chunk_size(inputs.case.tokens)
    indices, starts = [], [0]
    for adapter, length in enumerate(inputs.lengths):
        while length > 0:
            indices.append(adapter)
            starts.append(starts[-1] + min(size, length))
            length -= size

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=inputs.device)

    values = {
        "use_cuda_graph": False,
        "bs": inputs.case.tokens,
        "num_segments": len(indices),
        "max_len": size,
        "seg_indptr": tensor(starts),
        "weight_indices": tensor(indices),
        "lora_ranks": tensor(inputs.case.adapter_ranks),
        "scalings": inputs.scales[call].clone(),
        "seg_lens": None,
        "permutation": inputs.order.int(),
        "has_active_lora": True,
    }
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def pack_a(inputs: Inputs) -> Tensor:
    """[calls, adapters, S * max r, K]: projection s of an adapter of rank r starts at row s * r."""
    count, width = len(inputs.slices), inputs.case.site.width_in
    shape = (inputs.calls, inputs.case.adapters, count * inputs.max_rank, width)
    packed = torch.zeros(shape, dtype=DTYPE, device=inputs.device)
    for call in range(inputs.calls):
        for adapter, rank in enumerate(inputs.case.adapter_ranks):
            for s in range(count):
                packed[call, adapter, s * rank :][:rank] = inputs.a(call, s, adapter)
    return packed
