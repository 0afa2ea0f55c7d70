# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged KV cache, behind transformers' attention interface.

The model passes its own keyword arguments through to the attention function, so the batch travels
as an argument (``model(..., paged=PagedAttention)``) and not through hidden state.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from toppings.engine.batch import Batch, Segment
from toppings.engine.kv_cache import KvCache
from toppings.errors import UnsupportedModelError

__all__ = ["NAME", "PagedAttention"]

NAME = "toppings_paged"


@dataclass(frozen=True)
class PagedAttention:
    """What the attention of one forward pass reads and writes."""

    batch: Batch
    cache: KvCache


@dataclass(frozen=True)
class _Score:
    """How scores are made from products: softcap * tanh(scaling * q·k / softcap) inside a window of
    positions.
    """

    scaling: float | None
    window: int | None
    softcap: float | None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedAttention,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]. Writes the new keys and
    values first.
    """
    if attention_mask is not None:
        raise UnsupportedModelError("attention: expected no mask of the model's own, got one")
    if s_aux is not None:
        raise UnsupportedModelError("attention sinks: expected a model without them, got s_aux")
    index: int = module.layer_idx  # type: ignore[assignment]
    if index not in paged.cache.layers:
        _check_layer(module, index, sliding_window)
    batch, q = paged.batch, query[0].transpose(0, 1)  # [T, Hq, D]
    new_k, new_v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    k, v = paged.cache.layer(index, new_k, new_v)
    if batch.new_blocks.numel():
        # What is masked still enters the arithmetic: a stale inf or NaN of another request must
        # not.
        k.index_fill_(0, batch.new_blocks, 0)
        v.index_fill_(0, batch.new_blocks, 0)
    k.flatten(0, 1).index_copy_(0, batch.kv_index, new_k)
    v.flatten(0, 1).index_copy_(0, batch.kv_index, new_v)

    score = _Score(scaling, sliding_window, softcap)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    if batch.num_decode:
        out[: batch.num_decode] = _decode(q[: batch.num_decode], k, v, batch, score)
    for segment in batch.segments:
        rows = slice(segment.row, segment.row + segment.length)
        out[rows] = _prefill(q[rows], k, v, segment, score)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


def _check_layer(module: torch.nn.Module, index: int, window: int | None) -> None:
    """What can't change between passes, so a layer is asked once."""
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(
            "attention: expected a causal decoder, got bidirectional attention"
        )
    types = getattr(getattr(module, "config", None), "layer_types", None)
    if types and types[index] == "sliding_attention" and window is None:
        raise UnsupportedModelError(
            f"layer {index}: expected its sliding window as an argument, got none"
        )


def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, score: _Score
) -> torch.Tensor:
    """q [D, Hq, d], one query each. The query heads of a KV head stand as its rows, so nothing is
    repeated.
    """
    heads, groups = k.shape[2], q.shape[1] // k.shape[2]
    k = k[batch.decode_blocks].flatten(1, 2).transpose(1, 2)  # [D, Hkv, L, d]
    v = v[batch.decode_blocks].flatten(1, 2).transpose(1, 2)
    at = torch.arange(k.shape[2], device=q.device)
    last = batch.decode_context[:, None] - 1
    visible = at <= last
    if score.window is not None:
        visible &= at > last - score.window
    out = _attend(q.unflatten(1, (heads, groups)), k, v, visible[:, None, None, :], score)
    return out.flatten(1, 2)


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: Segment, score: _Score
) -> torch.Tensor:
    """q [n, Hq, d], the last n of the segment's positions."""
    heads, groups, length = k.shape[2], q.shape[1] // k.shape[2], segment.length
    k = k[segment.blocks].flatten(0, 1)[: segment.context].transpose(0, 1)  # [Hkv, L, d]
    v = v[segment.blocks].flatten(0, 1)[: segment.context].transpose(0, 1)
    at = torch.arange(segment.context, device=q.device)
    last = at[segment.context - length :, None]
    visible = at <= last
    if score.window is not None:
        visible &= at > last - score.window
    rows = q.transpose(0, 1).unflatten(0, (heads, groups)).flatten(1, 2)  # [Hkv, groups * n, d]
    out = _attend(rows[None], k[None], v[None], visible.repeat(groups, 1), score)[0]
    return out.reshape(heads * groups, length, -1).transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, score: _Score
) -> torch.Tensor:
    """softmax(score(q kᵀ)) v over the visible positions; q [B, Hkv, rows, d]."""
    out: torch.Tensor
    if score.softcap is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=score.scaling)
        return out
    scaling = q.shape[-1] ** -0.5 if score.scaling is None else score.scaling
    scores = (q @ k.transpose(-1, -2)) * scaling
    scores = torch.tanh(scores / score.softcap) * score.softcap
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf).float(), dim=-1)
    out = weights.to(v.dtype) @ v
    return out
