# SPDX-License-Identifier: Apache-2.0
"""The LoRA operators, as ``torch.ops.toppings.*``. Importing this module registers them.

T tokens, S projections that share their input, K input width, N_s output widths, L slots, r a
slot's own rank in a projection (0: absent). For every token t with slot i = token_slots[t] >= 0
and every projection s::

    y[t, s] += scales[s, i] * (x[t] @ A[s, i].T) @ B[s, i]

accumulated in float32, y rounded once.

========================================================================  ========================
``lora_forward(y, x, a, b, slots, scales, token_slots, widths,            y + delta, a new tensor
plan=None, max_rank=512)``
``lora_forward_(...)``                                                    the same in place
``lora_shrink(x, a, slots, token_slots, max_rank, plan=None)``            v = x @ A.T, float32
                                                                          [S, T, max_rank]
``lora_expand_(y, v, b, slots, scales, token_slots, widths, plan=None)``  y += scale * v @ B
``lora_plan(token_slots, num_slots)``                                     tokens grouped by slot,
                                                                          once a step
========================================================================  ========================

- y [T, sum(N_s)], x [T, K]: one dtype (bfloat16, float16, float32), contiguous rows, any row
  stride; x must not alias y. (lora_forward, which writes to new memory, takes any y.)
- a, b: 1-D storage of any of the three dtypes, A blocks [r, K] and B blocks [r, N_s] in it.
- slots int64 [S, L, 3]: element offset of A in a, of B in b, rank.
- scales float32 [S, L]; token_slots int32 [T], each in [-1, L), -1 for no adapter; widths: the N_s.
- plan: what ``lora_plan`` made of these very token_slots; max_rank bounds the ranks in use.

A wrong dtype, shape, device, offset, rank, slot or plan raises RuntimeError before anything is
written. On a GPU, where nothing waits for the numbers on the device, a slot outside [-1, L) counts
as -1, and offsets, ranks and plans are the caller's responsibility. max_rank bounds the workspace
there: give the largest rank in use. The operators can be captured into CUDA graphs and replayed
with other slots, scales and adapters.

``torch.compile(mode="reduce-overhead")`` (CUDA-graph trees) is not supported around them on a GPU:
they keep a workspace per stream, from torch's allocator, while the trees want everything that was
allocated in their pool back after a warm-up. Use ``torch.cuda.graph``, or the modes "default" and
"max-autotune-no-cudagraphs".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["pack_stacked", "slots_from_stacked"]

_load_library: Callable[[Path], None] = torch.ops.load_library
_load_library(Path(__file__).with_name("_ops.so"))


def _fake_forward(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slots: Tensor,
    widths: Sequence[int],
    plan: Tensor | None = None,
    max_rank: int = 512,
) -> Tensor:
    return y.new_empty(y.shape)


def _fake_forward_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slots: Tensor,
    widths: Sequence[int],
    plan: Tensor | None = None,
    max_rank: int = 512,
) -> None:
    return None


def _fake_shrink(
    x: Tensor,
    a: Tensor,
    slots: Tensor,
    token_slots: Tensor,
    max_rank: int,
    plan: Tensor | None = None,
) -> Tensor:
    return x.new_empty((slots.shape[0], x.shape[0], max_rank), dtype=torch.float32)


def _fake_expand_(
    y: Tensor,
    v: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slots: Tensor,
    widths: Sequence[int],
    plan: Tensor | None = None,
) -> None:
    return None


def _fake_plan(token_slots: Tensor, num_slots: int) -> Tensor:
    return token_slots.new_empty((2 * token_slots.shape[0] + 2,))


torch.library.register_fake("toppings::lora_forward", _fake_forward)
torch.library.register_fake("toppings::lora_forward_", _fake_forward_)
torch.library.register_fake("toppings::lora_shrink", _fake_shrink)
torch.library.register_fake("toppings::lora_expand_", _fake_expand_)
torch.library.register_fake("toppings::lora_plan", _fake_plan)


def slots_from_stacked(
    a: Tensor, b: Tensor, ranks: Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """slots[0, i] = (i * R * K, i * R * N, ranks[i]): describes stacked adapters without a copy.

    a [L, R, K] and b [L, R, N], contiguous, of any supported dtype; ranks [L] or None for R
    everywhere. Returns (a as 1-D, b as 1-D, slots int64 [1, L, 3]), views of the same storage.
    Stack the slots of several projections with ``torch.cat``. Raises ValueError for other shapes.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"a, b: expected [L, R, K] and [L, R, N], got {list(a.shape)} and {list(b.shape)}"
        )
    if not a.is_contiguous() or not b.is_contiguous():
        raise ValueError("a, b: expected contiguous tensors, got strided ones")
    num_slots, rank, width_in = a.shape
    if ranks is None:
        ranks = [rank] * num_slots
    slot_ranks = torch.as_tensor(ranks, dtype=torch.int64, device="cpu")
    if slot_ranks.shape != (num_slots,):
        raise ValueError(f"ranks: expected {num_slots} of them, got {list(slot_ranks.shape)}")
    if num_slots and not 0 <= int(slot_ranks.min()) <= int(slot_ranks.max()) <= rank:
        raise ValueError(f"ranks: expected each from 0 to {rank}, got {slot_ranks.tolist()}")
    index = torch.arange(num_slots, dtype=torch.int64)
    slots = torch.stack([index * rank * width_in, index * rank * b.shape[2], slot_ranks], dim=1)
    return a.view(-1), b.view(-1), slots[None].to(a.device)


def pack_stacked(
    a: Tensor, b: Tensor, ranks: Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """B[i] = b[i].T, once at load: for frameworks that keep b as [L, N, R].

    a [L, R, K], b [L, N, R]; the rest as in :func:`slots_from_stacked`, which describes the result.
    """
    if b.dim() != 3:
        raise ValueError(f"b: expected [L, N, R], got {list(b.shape)}")
    return slots_from_stacked(a.contiguous(), b.transpose(1, 2).contiguous(), ranks)
