# SPDX-License-Identifier: Apache-2.0
"""What a tensor of an adapter may be, the copy that makes it so, and its bytes."""

import ctypes
import math

import torch

from toppings.errors import InvalidArgumentError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    # NaN survives min and max, so two numbers tell about all of them.
    low, high = torch.aminmax(copy)
    if not math.isfinite(low.item()) or not math.isfinite(high.item()):
        overflow = bool(torch.isfinite(tensor).all())
        got = f"values beyond the range of {dtype}" if overflow else "NaN or infinity"
        raise InvalidArgumentError(f"{what}: expected finite values, got {got}")
    return copy


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements of ``tensor`` in row-major order, as they lie in memory."""
    dense = tensor.contiguous()
    # torch tensors offer no buffer interface without NumPy.
    return ctypes.string_at(dense.data_ptr(), dense.nbytes)
