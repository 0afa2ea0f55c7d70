# SPDX-License-Identifier: Apache-2.0
"""The yardstick of calls that memory limits: reading the same weights once and doing nothing else.

It takes part in the same rounds as the implementations, so that a share of it holds also while
neighbours on the machine use a part of the memory's bandwidth.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from inputs import Inputs
from peaks import load_library
from peers.interface import Run

ROOT = Path(__file__).resolve().parent.parent
PIECE = 64 << 10  # bytes; a multiple of what the loop reads at a time, as every block's rest is cut


def prepare_read(inputs: Inputs) -> Run:
    calls = [_pieces(inputs, call) for call in range(inputs.sets)]
    read = _library().toppings_read

    def run(call: int) -> None:
        read(*calls[call])

    return run


@functools.cache
def _library() -> ctypes.CDLL:
    return load_library(ROOT)


def _pieces(inputs: Inputs, call: int) -> tuple[ctypes.Array, ctypes.Array, int]:
    """The weights in use, in pieces small enough to be dealt out to the threads."""
    adapters = inputs.adapters(call)
    pieces = []
    for segment in inputs.segments:
        adapter = adapters[segment.local]
        a_bytes, b_bytes = (
            block.numel() * block.element_size() for block in (adapter.a, adapter.b)
        )
        start, stop = adapter.a.data_ptr(), adapter.b.data_ptr() + b_bytes
        share = -(-(a_bytes + b_bytes) // torch.get_num_threads())
        size = min(PIECE, -(-share // 256) * 256)
        pieces += [(at, min(size, stop - at)) for at in range(start, stop, size)]
    starts, sizes = zip(*pieces, strict=True)
    count = len(pieces)
    return (ctypes.c_void_p * count)(*starts), (ctypes.c_int64 * count)(*sizes), count
