# SPDX-License-Identifier: Apache-2.0
"""The operators again, in plain torch: the oracle that the kernels are tested against.

Arguments as in :mod:`toppings.ops`. Everything is computed in `dtype`, float64 by default, and
returned in it: nothing is rounded to the dtype of y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["lora_expand", "lora_forward", "lora_shrink"]


def _block(storage: Tensor, offset: int, rank: int, width: int, dtype: torch.dtype) -> Tensor:
    return storage[offset : offset + rank * width].reshape(rank, width).to(dtype)


def lora_shrink(
    x: Tensor,
    a: Tensor,
    slots: Tensor,
    token_slots: Tensor,
    max_rank: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """v[s, t, :r] = x[t] @ A[s, i].T, zero elsewhere; [S, T, max_rank]."""
    v = torch.zeros(slots.shape[0], x.shape[0], max_rank, dtype=dtype, device=x.device)
    for s, table in enumerate(slots.tolist()):
        for i, (a_offset, _, rank) in enumerate(table):
            rows = (token_slots == i).nonzero()[:, 0]
            if len(rows) > 0:
                block = _block(a, a_offset, rank, x.shape[1], dtype)
                v[s, rows, :rank] = x[rows].to(dtype) @ block.T
    return v


def lora_expand(
    y: Tensor,
    v: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slots: Tensor,
    widths: Sequence[int],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """y[t, s] + scales[s, i] * v[s, t, :r] @ B[s, i], a new tensor."""
    parts = list(torch.split(y.to(dtype, copy=True), list(widths), dim=1))
    for s, table in enumerate(slots.tolist()):
        for i, (_, b_offset, rank) in enumerate(table):
            rows = (token_slots == i).nonzero()[:, 0]
            if len(rows) > 0:
                delta = v[s, rows, :rank].to(dtype) @ _block(b, b_offset, rank, widths[s], dtype)
                parts[s][rows] += scales[s, i].to(dtype) * delta
    return torch.cat(parts, dim=1)


def lora_forward(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slots: Tensor,
    widths: Sequence[int],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """y[t, s] + scales[s, i] * (x[t] @ A[s, i].T) @ B[s, i], a new tensor."""
    max_rank = int(slots[:, :, 2].max()) if slots.numel() else 0
    v = lora_shrink(x, a, slots, token_slots, max_rank, dtype)
    return lora_expand(y, v, b, slots, scales, token_slots, widths, dtype)
