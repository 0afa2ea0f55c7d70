# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, checked in full before anything of its data is touched.

The format: eight bytes of length n, n bytes of JSON, the tensors' data without holes. The checks of
the safetensors package are repeated here because a key given twice, or an offset that lies,
deserves a message that names the tensor, and because dtypes and shapes must be known before
memory is taken.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from toppings.adapter.parsing import is_int, open_regular, parse_object, shown
from toppings.errors import AdapterFormatError, UnsupportedAdapterError

MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
_MAX_DIMS = 8
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file, as its header has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name; reads the header only.

    Raises AdapterFormatError for any damage, UnsupportedAdapterError for a dtype outside
    F32, F16 and BF16.
    """
    where = str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        limit = min(MAX_HEADER_BYTES, size - 8)
        if len(prefix) < 8 or length > limit:
            raise AdapterFormatError(
                f"safetensors header: expected at most {max(limit, 0)} bytes in a file of {size}, "
                f"got {length if len(prefix) == 8 else 'no length'} ({where})"
            )
        data = file.read(length)
    if data[:1] != b"{" or len(data) != length:
        raise AdapterFormatError(f"safetensors header: expected a JSON object, got none ({where})")
    raw = parse_object(data, "safetensors header", where)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFormatError(
            f"safetensors header: expected strings in __metadata__, got another ({where})"
        )
    tensors = {}
    spans = []
    for name, entry in raw.items():
        tensors[name], span = _parse_entry(name, entry, where)
        spans.append((*span, name))
    _check_spans(spans, size - 8 - length, where)
    return tensors


def _parse_entry(name: str, entry: object, where: str) -> tuple[TensorInfo, tuple[int, int]]:
    def fail(expected: str, got: object) -> AdapterFormatError:
        return AdapterFormatError(
            f"tensor {shown(name)}: expected {expected}, got {shown(got)} ({where})"
        )

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("an object of dtype, shape and data_offsets", entry)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str):
        raise fail("a dtype", code)
    if code not in _DTYPES:
        raise UnsupportedAdapterError(
            f"tensor {shown(name)}: expected dtype F32, F16 or BF16, got {shown(code)} ({where})"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not _sizes(shape):
        raise fail(f"a shape of at most {_MAX_DIMS} sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not _sizes(offsets):
        raise fail("two data_offsets", offsets)
    begin, end = offsets
    dtype = _DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise fail(f"{math.prod(shape) * dtype.itemsize} bytes for its shape", end - begin)
    return TensorInfo(name, dtype, tuple(shape)), (begin, end)


def _sizes(values: list[object]) -> bool:
    return all(is_int(value) and value >= 0 for value in values)


def _check_spans(spans: list[tuple[int, int, str]], size: int, where: str) -> None:
    """The tensors must cover the data exactly: no hole, no overlap, nothing before or after."""
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered or end > size:
            raise AdapterFormatError(
                f"tensor {shown(name)}: expected data from byte {covered} within {size}, "
                f"got {begin} to {end} ({where})"
            )
        covered = end
    if covered != size:
        raise AdapterFormatError(
            f"safetensors data: expected {covered} bytes for the tensors, got {size} ({where})"
        )
