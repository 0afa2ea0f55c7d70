# SPDX-License-Identifier: Apache-2.0
"""Names of adapters, the files behind them and their images in the host store."""

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from toppings._runtime import (
    AdapterLayout,
    HostStore,
    Image,
    ImageBuilder,
    ImageRead,
    ImageReader,
    ModelShape,
    read_image_header,
)
from toppings.adapter import Adapter, read_adapter
from toppings.adapter.image import (
    Modules,
    check_rank,
    dtype_name,
    fill,
    is_packed,
    layout_of,
    pack,
)
from toppings.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CancelledError,
    InvalidArgumentError,
    StoreFullError,
    UnknownAdapterError,
)

__all__ = ["AdapterLibrary", "PreparedAdapter", "pack"]

_CLOSE_SECONDS = 0.2  # how long a read that waits for room may take to see that close() was called


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


@dataclass(frozen=True)
class _ReadKey:
    digest: str
    path: Path
    patience_seconds: float


@dataclass
class _Read:
    """One image being read again; everybody who asks for it meanwhile gets this future."""

    future: Future[Image] = field(default_factory=Future)
    ticket: ImageRead | None = None  # of a packed file, once it has begun

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # no one may cancel it for the others


class AdapterLibrary:
    """Maps a name to an adapter's files and its image; the only module that knows both.

    An adapter is a PEFT folder, a packed file (``toppings pack``) or made in memory. An image whose
    adapter came from files may be evicted from the store; the next use reads them again, at most
    ``parallel_reads`` at the same time. Thread-safe.
    """

    def __init__(
        self,
        store: HostStore,
        shape: ModelShape,
        modules: Modules,
        dtype: torch.dtype,
        max_rank: int = 512,
        parallel_reads: int = 2,
    ) -> None:
        if parallel_reads < 1:
            raise InvalidArgumentError(f"parallel_reads: expected at least 1, got {parallel_reads}")
        self._store, self._shape, self._modules = store, shape, modules
        self._dtype, self._max_rank = dtype, max_rank
        self._reader = ImageReader(store, parallel_reads)
        self._pool = ThreadPoolExecutor(parallel_reads, thread_name_prefix="toppings-read")
        self._lock = threading.Lock()  # guards what follows
        self._entries: dict[str, _Entry] = {}
        self._reads: dict[_ReadKey, _Read] = {}
        self._is_closed = False

    def names(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> Image:
        """Reads an adapter (a PEFT folder, a packed file, or one in memory) and files it under a
        name, replacing an older one.

        Nothing changes when it fails.

        Raises:
            AdapterFormatError, UnsupportedAdapterError: see :func:`toppings.read_adapter`.
            AdapterMismatchError: a module or a shape the base model doesn't have, a rank above
                max_rank, or a packed file of another base model or dtype.
            FileError: a packed file can't be read.
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
            return PreparedAdapter(adapter.digest, None, self._image_of(adapter, 0.0))
        path = Path(os.fsdecode(adapter))
        image = self._read(path, _Read(), 0.0)
        return PreparedAdapter(image.digest, path, image)

    def commit(self, name: str, prepared: PreparedAdapter) -> None:
        """The second half: takes the name."""
        held = prepared.image if prepared.path is None else None
        with self._lock:
            old = self._entries.get(name)
            self._entries[name] = _Entry(prepared.digest, prepared.path, held)
            if old is not None:
                self._forget(old.digest)

    def remove(self, name: str) -> None:
        """Forgets a name. Requests that hold the image keep it."""
        with self._lock:
            entry = self._entry(name)
            del self._entries[name]
            self._forget(entry.digest)

    def image(self, name: str) -> Image:
        """The adapter's image, read again from its files when the store had to let it go."""
        return self.fetch(name).result()

    def fetch(self, name: str, patience_seconds: float = 0.0) -> Future[Image]:
        """The same without waiting: a future that is done already, or will be when the files have
        been read in the background. It stays what was asked for when the name is replaced
        meanwhile. While it is alive, the image is in use.

        Callers share it, so it can't be cancelled. patience_seconds: how long the read may wait for
        room in the store.

        Raises UnknownAdapterError at once; everything else comes from the future.
        """
        with self._lock:
            entry = self._entry(name)
            image = entry.image or self._store.find(entry.digest)
            if image is not None:
                done = Future[Image]()
                done.set_result(image)
                return done
            if entry.path is None:
                raise RuntimeError("unreachable: an adapter without files holds its image")
            if self._is_closed:
                raise CancelledError(
                    f"adapter {name!r}: expected an open library, got a closed one"
                )
            key = _ReadKey(entry.digest, entry.path, patience_seconds)
            read = self._reads.get(key)
            if read is None:
                read = self._reads[key] = _Read()
                self._pool.submit(self._read_again, name, key, read)
            return read.future

    def close(self) -> None:
        """Ends the reads in the background, their futures with CancelledError, and waits for that.

        What is in the store can be had from then on, but nothing is read again.
        """
        with self._lock:
            self._is_closed = True
            reads = list(self._reads.values())
            for read in reads:
                if read.ticket is not None:
                    read.ticket.cancel()
        self._pool.shutdown(cancel_futures=True)
        self._reads.clear()
        for read in reads:
            if not read.future.done():  # never begun
                read.future.set_exception(_closed())

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries)[:8]) or "none"
            raise UnknownAdapterError(
                f"adapter: expected one of those added ({known}), got {name!r}"
            ) from None

    def _forget(self, digest: str) -> None:
        if not any(entry.digest == digest for entry in self._entries.values()):
            self._store.erase(digest)

    def _read_again(self, name: str, key: _ReadKey, read: _Read) -> None:
        """In the pool: settles the future, whatever happens."""
        try:
            image = self._read(key.path, read, key.patience_seconds)
            if image.digest != key.digest:
                with self._lock:
                    self._forget(image.digest)
                raise AdapterFormatError(
                    f"adapter {name!r}: expected the files it was added with, got other ones"
                    f" ({key.path}: digest {image.digest[:12]}, not {key.digest[:12]});"
                    " add it again"
                )
        except BaseException as error:
            self._end_read(key)
            # Its frames hold the image or the builder, whose bytes would count as long as it lives.
            read.future.set_exception(error.with_traceback(None))
        else:
            self._end_read(key)
            read.future.set_result(image)

    def _end_read(self, key: _ReadKey) -> None:
        with self._lock:
            del self._reads[key]
            self._forget(key.digest)  # unless a name still leads to it

    def _read(self, path: Path, read: _Read, patience_seconds: float) -> Image:
        if not is_packed(path):
            return self._image_of(read_adapter(path), patience_seconds)
        header = read_image_header(str(path))
        if header.layout.dtype != dtype_name(self._dtype):
            raise AdapterMismatchError(
                f"{path}: expected an adapter packed as {dtype_name(self._dtype)},"
                f" got {header.layout.dtype}"
            )
        check_rank(str(path), header.layout.max_rank, self._max_rank)
        with self._lock:
            self._check_open()
            read.ticket = self._reader.read(str(path), self._shape, patience_seconds)
        image = read.ticket.wait()
        if image is None:
            raise RuntimeError("unreachable: there was no time limit")
        if image.digest != header.digest:
            raise AdapterFormatError(f"{path}: expected one file, got another while it was read")
        return image

    def _image_of(self, adapter: Adapter, patience_seconds: float) -> Image:
        image = self._store.find(adapter.digest)
        if image is None:
            layout = layout_of(adapter, self._shape, self._modules, self._dtype, self._max_rank)
            builder = self._build(layout, adapter.digest, patience_seconds)
            fill(builder, adapter, self._modules)
            image = self._store.insert(builder)
        if image.layout.dtype != dtype_name(self._dtype):
            raise InvalidArgumentError(
                f"store: expected images of {dtype_name(self._dtype)}, got one of"
                f" {image.layout.dtype} for digest {adapter.digest[:12]};"
                " a store serves one base model in one dtype"
            )
        return image

    def _build(self, layout: AdapterLayout, digest: str, patience_seconds: float) -> ImageBuilder:
        """Waits in slices, in order to see that the library was closed."""
        end = time.monotonic() + patience_seconds
        while True:
            left = end - time.monotonic()
            try:
                return self._store.build(layout, digest, min(max(left, 0.0), _CLOSE_SECONDS))
            except StoreFullError:
                self._check_open()
                if left <= _CLOSE_SECONDS:
                    raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise _closed()


def _closed() -> CancelledError:
    return CancelledError("adapter library: expected an open one, got a closed one")
