# SPDX-License-Identifier: Apache-2.0
"""What a tensor of an adapter may be, the copy that makes it so, and its bytes."""

import ctypes
import math

import torch

from toppings.errors import InvalidArgumentError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# torch splits an operation over threads from 32,768 elements on. A reader shares its cores with the
# engine: on two busy ones, waiting for the other thread at each of hundreds of tensors turned 0.1 s
# of reading (84 MB) into as much as 6 s. Smaller parts stay on the calling thread.
_PART = 1 << 14
_MAX_SCALE = torch.finfo(torch.float32).max


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuses a ``dtype`` that adapters cannot have; None means "as it is"."""
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgumentError(
            f"dtype: expected torch.float32, float16, bfloat16 or None, got {dtype!r}"
        )


def is_scale(value: float) -> bool:
    """Whether ``value`` is finite in float32, the type in which kernels apply it."""
    return math.isfinite(value) and abs(value) <= _MAX_SCALE


def finite_copy(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """A contiguous CPU copy of ``tensor`` in ``dtype``; values that aren't finite there are errors.

    Always a copy, so that no later change to a file mapping or to the caller's tensor reaches it.
    """
    copy = torch.empty(tensor.shape, dtype=dtype)
    flat, source_flat = copy.view(-1), tensor.detach().reshape(-1)
    for begin in range(0, flat.numel(), _PART):
        part, source = flat[begin : begin + _PART], source_flat[begin : begin + _PART]
        # NaN survives min and max, so two numbers tell about all of them.
        low, high = torch.aminmax(part.copy_(source))
        if not math.isfinite(low.item()) or not math.isfinite(high.item()):
            overflow = bool(torch.isfinite(source).all())
            got = f"values beyond the range of {dtype}" if overflow else "NaN or infinity"
            raise InvalidArgumentError(f"{what}: expected finite values, got {got}")
    return copy


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements of ``tensor`` in row-major order, as they lie in memory."""
    dense = tensor.contiguous()
    # torch tensors offer no buffer interface without NumPy.
    return ctypes.string_at(dense.data_ptr(), dense.nbytes)
