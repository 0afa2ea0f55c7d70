# SPDX-License-Identifier: Apache-2.0
"""What vLLM's and SGLang's operators are given, with plain torch in their place."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gpu.cases import Case, Site
from gpu.clock import HostClock
from gpu.inputs import Inputs
from gpu.measure import measure
from gpu.peers.sglang_chunked import SglangChunked, chunk_size, make_info
from gpu.peers.toppings_operator import ToppingsOperator
from gpu.peers.vllm_triton import CACHES, VllmTriton, make_meta
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
META = "vllm/lora/ops/triton_ops/lora_kernel_metadata.py"
CPU = torch.device("cpu")
SITE = Site("tiny", "qkv", 64, (64, 32, 32))
CASES = [
    Case("decode", SITE, 12, 5, (8, 16, 4)),
    Case("decode", SITE, 1, 1, (8,)),
    Case("prefill", SITE, 70, 3, (8, 16, 32)),
]


@dataclass
class Meta:
    """vLLM's LoRAKernelMeta as far as shrink and expand below use it."""

    adapters: int
    slots: Tensor | None = None

    @classmethod
    def make(cls, max_loras: int, max_num_tokens: int, device: torch.device) -> "Meta":
        return cls(max_loras)

    def prepare_tensors(self, token_lora_mapping: Tensor) -> None:
        self.slots = token_lora_mapping

    def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple:
        return (self.slots, *(None,) * 6)


def shrink(x: Tensor, a: list[Tensor], v: Tensor, slots: Tensor, *rest) -> None:
    *_, scaling = rest
    for part, weights in zip(v, a, strict=True):
        chosen = weights[slots.long(), 0].float()
        part.copy_(scaling * torch.einsum("tk,trk->tr", x.float(), chosen))


def expand(
    v: Tensor,
    b: list[Tensor],
    y: Tensor,
    slots: Tensor,
    *_,
    offset_start: int,
    add_inputs: bool,
) -> None:
    assert add_inputs
    for part, weights in zip(v, b, strict=True):
        assert weights.is_contiguous()
        chosen = weights[slots.long(), 0].float()
        delta = torch.einsum("tr,tnr->tn", part, chosen)
        y[:, offset_start : offset_start + weights.shape[2]] += delta.to(y.dtype)
        offset_start += weights.shape[2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_vllm_gets_weights_of_each_call_and_an_empty_cache(case: Case):
    caches = SimpleNamespace(**{name: {"old": 1} for name in CACHES})
    operators = SimpleNamespace(lora_shrink=shrink, lora_expand=expand, LoRAKernelMeta=Meta)
    peers = [ToppingsOperator(), VllmTriton(operators, caches, "0")]
    with torch.inference_mode():
        result = measure(case, peers, HostClock(), CPU, seed=3, seconds=0)
    assert not result.failures and set(result.errors) == {"toppings", "vLLM"}
    assert not any(getattr(caches, name) for name in CACHES)


def vllm_meta() -> ModuleType:
    found = list(ROOT.glob(f".cache/peers/lib/python*/site-packages/{META}"))
    if not found:
        pytest.skip("vLLM isn't there: make bench-peers")
    spec = importlib.util.spec_from_file_location("vllm_lora_kernel_metadata", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vllms_own_metadata_groups_the_tokens():
    inputs = Inputs(CASES[0], CPU, seed=1)
    meta = make_meta(vllm_meta().LoRAKernelMeta, inputs)
    assert torch.equal(meta[0], inputs.token_slots)
    assert torch.equal(meta[1].long(), inputs.order)
    assert meta[2][: inputs.case.adapters].tolist() == inputs.lengths
    assert not meta[5].item() and meta[6].item() == inputs.case.adapters


@dataclass
class Info:
    """SGLang's LoRABatchInfo, of a version without has_active_lora."""

    use_cuda_graph: bool
    bs: int
    num_segments: int
    max_len: int
    seg_indptr: Tensor
    weight_indices: Tensor
    lora_ranks: Tensor
    scalings: Tensor
    seg_lens: Tensor | None
    permutation: Tensor

    def rows(self):
        for n in range(self.num_segments):
            rows = self.permutation[self.seg_indptr[n] : self.seg_indptr[n + 1]].long()
            adapter = int(self.weight_indices[n])
            yield rows, adapter, int(self.lora_ranks[adapter])


def chunked_shrink(x: Tensor, weights: Tensor, info: Info, num_slices: int) -> Tensor:
    assert weights.is_contiguous() and x.is_contiguous()
    v = torch.full((len(x), weights.shape[1]), torch.nan)
    for rows, adapter, rank in info.rows():
        count = rank * num_slices
        v[rows, :count] = x[rows].float() @ weights[adapter, :count].float().T
    return v


def chunked_expand(
    v: Tensor, weights: Tensor, info: Info, offsets: Tensor, widest: int, y: Tensor
) -> Tensor:
    assert weights.is_contiguous() and widest == int(offsets.diff().max())
    for rows, adapter, rank in info.rows():
        for s, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            b = weights[adapter, start:stop, :rank].float()
            delta = info.scalings[adapter] * v[rows, s * rank : (s + 1) * rank] @ b.T
            y[rows, start:stop] += delta.to(y.dtype)
    return y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_sglang_gets_chunks_and_packed_ranks(case: Case):
    class Kernel:
        kernel_cache = {"old": 1}  # as SGLang's wrapper of a kernel has it

    shrinks = SimpleNamespace(chunked_sgmv_lora_shrink_forward=chunked_shrink, kernel=Kernel)
    expands = SimpleNamespace(chunked_sgmv_lora_expand_forward=chunked_expand)
    peers = [ToppingsOperator(), SglangChunked(shrinks, expands, Info, "0")]
    with torch.inference_mode():
        result = measure(case, peers, HostClock(), CPU, seed=3, seconds=0)
    assert not result.failures and set(result.errors) == {"toppings", "SGLang"}
    assert not Kernel.kernel_cache


def test_chunks_cover_the_tokens_and_hold_one_adapter_each():
    inputs = Inputs(CASES[2], CPU, seed=1)
    info = make_info(Info, inputs, 0)
    assert info.max_len == chunk_size(70) == 32
    starts = info.seg_indptr.tolist()
    assert starts[0] == 0 and starts[-1] == 70
    for rows, adapter, _ in info.rows():
        assert 1 <= len(rows) <= 32
        assert set(inputs.token_slots[rows].tolist()) == {adapter}
    assert [chunk_size(tokens) for tokens in (1, 64, 256)] == [16, 32, 128]
