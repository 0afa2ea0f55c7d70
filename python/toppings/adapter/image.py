# SPDX-License-Identifier: Apache-2.0
"""An adapter laid out for one base model, as an image in memory or as a packed file."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from toppings._runtime import (
    AdapterLayout,
    HostStore,
    Image,
    ImageBuilder,
    ModelShape,
    read_image_header,
    write_image,
)
from toppings.adapter.adapter import Adapter
from toppings.adapter.inspect import ModuleFacts, table
from toppings.errors import AdapterMismatchError

Modules = Mapping[str, tuple[int, int]]  # module path -> (layer, projection) in a ModelShape


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout_of(
    adapter: Adapter,
    shape: ModelShape,
    modules: Modules,
    dtype: torch.dtype,
    max_rank: int | None = None,
) -> AdapterLayout:
    """Where the adapter's blocks go. AdapterMismatchError: a module or a shape the base model
    doesn't have, or a rank above max_rank.
    """
    ranks = [[0] * len(shape.layer(i)) for i in range(shape.num_layers)]
    for path, module in adapter.modules.items():
        if path not in modules:
            raise AdapterMismatchError(
                f"{path}: expected a linear of the base model's decoder, got a module it lacks"
            )
        layer, projection = modules[path]
        _, k, n = shape.layer(layer)[projection]
        if module.a.shape[1] != k or module.b.shape[0] != n:
            raise AdapterMismatchError(
                f"{path}: expected A [r, {k}] and B [{n}, r] for this base model,"
                f" got A {list(module.a.shape)} and B {list(module.b.shape)}"
            )
        check_rank(path, module.rank, max_rank)
        ranks[layer][projection] = module.rank
    return AdapterLayout(shape, dtype_name(dtype), ranks)


def check_rank(where: str, rank: int, max_rank: int | None) -> None:
    if max_rank is not None and rank > max_rank:
        raise AdapterMismatchError(f"{where}: expected a rank of at most {max_rank}, got {rank}")


def fill(builder: ImageBuilder, adapter: Adapter, modules: Modules) -> None:
    for path, module in adapter.modules.items():
        layer, projection = modules[path]
        builder.set(layer, projection, module.a.contiguous(), module.b.contiguous(), module.scale)


def pack(
    adapter: Adapter,
    shape: ModelShape,
    modules: Modules,
    dtype: torch.dtype,
    path: str | os.PathLike[str],
) -> Image:
    """Writes the adapter, laid out for a base model and cast, to a packed file; returns what it
    wrote. The file keeps the adapter's digest.

    Raises AdapterMismatchError, InvalidArgumentError (a value beyond the dtype), FileError.
    """
    layout = layout_of(adapter, shape, modules, dtype)
    store = HostStore(layout.bytes)
    builder = store.build(layout, adapter.digest)
    fill(builder, adapter, modules)
    image = store.insert(builder)
    write_image(image, os.fsdecode(path))
    return image


def is_packed(path: str | os.PathLike[str]) -> bool:
    """A packed adapter is a regular file, any other one a folder; its content is checked when it
    is read.
    """
    return Path(os.fsdecode(path)).is_file()


def describe_packed(path: str | os.PathLike[str]) -> str:
    """Aligned text, as `describe` gives for an adapter."""
    header = read_image_header(os.fsdecode(path))
    layout, shape = header.layout, header.layout.shape
    facts = []
    for layer in range(shape.num_layers):
        for i, (name, k, n) in enumerate(shape.layer(layer)):
            rank = layout.rank(layer, i)
            if rank > 0:
                item = torch.float32.itemsize if layout.dtype == "float32" else 2
                scale = header.scales[shape.row(layer, i)]
                facts.append(ModuleFacts(name, k, n, rank, scale, rank * (k + n) * item))
    return table(os.fsdecode(path), header.digest, layout.dtype, layout.bytes, facts)
