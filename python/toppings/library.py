# SPDX-License-Identifier: Apache-2.0
"""Names of adapters, the files behind them and their images in the host store."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from toppings._runtime import AdapterLayout, HostStore, Image, ModelShape
from toppings.adapter import Adapter, read_adapter
from toppings.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    InvalidArgumentError,
    UnknownAdapterError,
)

__all__ = ["AdapterLibrary", "PreparedAdapter"]


@dataclass(frozen=True)
class _Entry:
    digest: str
    path: Path | None  # None: made in memory, so its image can't be read again
    image: Image | None  # held when there is no path


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter that was read, checked against the base model and stored, but has no name yet."""

    digest: str
    path: Path | None
    image: Image


class AdapterLibrary:
    """Maps a name to an adapter's files and its image; the only module that knows both.

    An image whose adapter came from files may be evicted from the store; the next use reads them
    again.
    """

    def __init__(
        self,
        store: HostStore,
        shape: ModelShape,
        modules: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        max_rank: int = 512,
    ) -> None:
        self._store, self._shape, self._modules = store, shape, modules
        self._dtype, self._max_rank = dtype, max_rank
        self._entries: dict[str, _Entry] = {}

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> Image:
        """Reads an adapter (a PEFT folder, or one in memory) and files it under a name, replacing
        an older one.

        Nothing changes when it fails.

        Raises:
            AdapterFormatError, UnsupportedAdapterError: see :func:`toppings.read_adapter`.
            AdapterMismatchError: a module or a shape the base model doesn't have, or a rank above
                max_rank.
            StoreFullError: the store's budget is taken by adapters in use.
        """
        entry = self.prepare(name, adapter)
        self.commit(name, entry)
        return entry.image

    def prepare(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> PreparedAdapter:
        """The first, slow half of :meth:`add`: everything that can fail. Changes no name; safe
        beside other calls.
        """
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError(f"adapter name: expected a non-empty string, got {name!r}")
        if isinstance(adapter, Adapter):
            return PreparedAdapter(adapter.digest, None, self._image_of(adapter))
        source = read_adapter(adapter)
        return PreparedAdapter(source.digest, Path(adapter), self._image_of(source))

    def commit(self, name: str, prepared: PreparedAdapter) -> None:
        """The second half: takes the name."""
        old = self._entries.get(name)
        held = prepared.image if prepared.path is None else None
        self._entries[name] = _Entry(prepared.digest, prepared.path, held)
        if old is not None:
            self._forget(old.digest)

    def remove(self, name: str) -> None:
        """Forgets a name. Requests that hold the image keep it."""
        self._forget(self._entry(name).digest, without=name)
        del self._entries[name]

    def image(self, name: str) -> Image:
        """The adapter's image, read again from its files when the store had to let it go."""
        entry = self._entry(name)
        image = entry.image or self._store.find(entry.digest)
        if image is not None:
            return image
        if entry.path is None:
            raise RuntimeError("unreachable: an adapter without files holds its image")
        adapter = read_adapter(entry.path)
        if adapter.digest != entry.digest:
            raise AdapterFormatError(
                f"adapter {name!r}: expected the files it was added with, got other ones"
                f" ({entry.path}: digest {adapter.digest[:12]}, not {entry.digest[:12]});"
                " add it again"
            )
        return self._image_of(adapter)

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries)[:8]) or "none"
            raise UnknownAdapterError(
                f"adapter: expected one of those added ({known}), got {name!r}"
            ) from None

    def _forget(self, digest: str, without: str | None = None) -> None:
        if not any(e.digest == digest for n, e in self._entries.items() if n != without):
            self._store.erase(digest)

    def _image_of(self, adapter: Adapter) -> Image:
        image = self._store.find(adapter.digest)
        if image is not None:
            return image
        ranks = [[0] * len(self._shape.layer(i)) for i in range(self._shape.num_layers)]
        for path, module in adapter.modules.items():
            layer, projection = self._locate(path)
            _, k, n = self._shape.layer(layer)[projection]
            if module.a.shape[1] != k or module.b.shape[0] != n:
                raise AdapterMismatchError(
                    f"{path}: expected A [r, {k}] and B [{n}, r] for this base model,"
                    f" got A {list(module.a.shape)} and B {list(module.b.shape)}"
                )
            if module.rank > self._max_rank:
                raise AdapterMismatchError(
                    f"{path}: expected a rank of at most {self._max_rank}, got {module.rank}"
                )
            ranks[layer][projection] = module.rank
        layout = AdapterLayout(self._shape, str(self._dtype).removeprefix("torch."), ranks)
        builder = self._store.build(layout, adapter.digest)
        for path, module in adapter.modules.items():
            layer, projection = self._locate(path)
            builder.set(
                layer, projection, module.a.contiguous(), module.b.contiguous(), module.scale
            )
        return self._store.insert(builder)

    def _locate(self, path: str) -> tuple[int, int]:
        try:
            return self._modules[path]
        except KeyError:
            raise AdapterMismatchError(
                f"{path}: expected a linear of the base model's decoder, got a module it lacks"
            ) from None
