# SPDX-License-Identifier: Apache-2.0
"""Names of adapters, the files behind them and their images in the host store."""

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

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

_CANCEL_SECONDS = 0.2  # how long a read that waits for room may take to see that it is cancelled


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
    num_waiting: int = 0
    is_cancelled: bool = False
    ticket: ImageRead | None = None  # of a packed file, once it has begun

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # no one may cancel it for the others

    def cancel(self) -> None:
        """Under the library's lock, as the ticket may come meanwhile."""
        self.is_cancelled = True
        if self.ticket is not None:
            self.ticket.cancel()


class _Threads:
    """Runs calls in threads that end when the interpreter's exit handlers call shutdown(): it joins
    an executor's threads before those run, so a read that waits would hold up the exit.

    submit() is for one thread at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[[], None]) -> None:
        if len(self._threads) < self._most:
            thread = threading.Thread(
                target=_serve, args=(self._calls,), name="toppings-read", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._calls.put(call)

    def shutdown(self) -> None:
        """Drops the calls not begun and waits for the others."""
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # which let go of the library last
                thread.join()


def _serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it holds the library, which may be gone before the next one comes


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
        self._threads = _Threads(parallel_reads)
        self._lock = threading.Lock()  # guards what follows
        self._entries: dict[str, _Entry] = {}
        self._reads: dict[_ReadKey, _Read] = {}
        self._closed = threading.Event()
        # Also at the interpreter's exit.
        end = (self._closed, self._lock, self._reads, self._threads)
        self._end = weakref.finalize(self, _end_reads, *end)

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
            CancelledError: there are files to read, and the library is closed.
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

    def discard(self, prepared: PreparedAdapter) -> None:
        """Instead of :meth:`commit`: its image leaves the store unless a name leads to it."""
        with self._lock:
            self._forget(prepared.digest)

    def remove(self, name: str) -> None:
        """Forgets a name. Requests that hold the image keep it."""
        with self._lock:
            entry = self._entry(name)
            del self._entries[name]
            self._forget(entry.digest)

    def image(self, name: str) -> Image:
        """The adapter's image, read again from its files when the store had to let it go."""
        future = self.fetch(name)
        try:
            return future.result()
        except BaseException:
            self.give_up(future)
            raise

    def fetch(self, name: str, patience_seconds: float = 0.0) -> Future[Image]:
        """The same without waiting: a future that is done already, or will be when the files have
        been read in the background. It stays what was asked for when the name is replaced
        meanwhile. While it is alive, the image is in use.

        Callers share it, so it can't be cancelled; who doesn't wait for it any more says so with
        :meth:`give_up`. patience_seconds: how long the read may wait for room in the store.

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
            if self._closed.is_set():
                raise CancelledError(
                    f"adapter {name!r}: expected an open library, got a closed one"
                )
            key = _ReadKey(entry.digest, entry.path, patience_seconds)
            read = self._reads.get(key)
            if read is None:
                read = _Read()
                self._threads.submit(partial(self._read_again, name, key, read))
                self._reads[key] = read
            read.num_waiting += 1
            return read.future

    def give_up(self, future: Future[Image]) -> None:
        """Takes one :meth:`fetch` back: a read that nobody waits for any more is cancelled. Does
        nothing once it is through.
        """
        with self._lock:
            key = next((k for k, r in self._reads.items() if r.future is future), None)
            if key is None:
                return
            read = self._reads[key]
            read.num_waiting -= 1
            if read.num_waiting == 0:
                del self._reads[key]  # who asks from now on gets a read of its own
                read.cancel()

    def close(self) -> None:
        """Ends the reads in the background, their futures with CancelledError, and waits for that.

        What is in the store can be had from then on, but nothing is read again.
        """
        _end_reads(self._closed, self._lock, self._reads, self._threads)
        self._end.detach()

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
            self._end_read(key, read)
            # Its frames hold the image or the builder, whose bytes would count as long as it lives.
            read.future.set_exception(error.with_traceback(None))
        else:
            self._end_read(key, read)
            read.future.set_result(image)

    def _end_read(self, key: _ReadKey, read: _Read) -> None:
        with self._lock:
            if self._reads.get(key) is read:
                del self._reads[key]
            self._forget(key.digest)  # unless a name still leads to it

    def _read(self, path: Path, read: _Read, patience_seconds: float) -> Image:
        self._check_wanted(read)
        if not is_packed(path):
            _check_exists(path)
            return self._image_of(read_adapter(path), patience_seconds, read)
        header = read_image_header(str(path))
        if header.layout.dtype != dtype_name(self._dtype):
            raise AdapterMismatchError(
                f"{path}: expected an adapter packed as {dtype_name(self._dtype)},"
                f" got {header.layout.dtype}"
            )
        check_rank(str(path), header.layout.max_rank, self._max_rank)
        with self._lock:
            self._check_wanted(read)
            read.ticket = self._reader.read(str(path), self._shape, patience_seconds)
        image = read.ticket.wait()
        if image is None:
            raise RuntimeError("unreachable: there was no time limit")
        if image.digest != header.digest:
            raise AdapterFormatError(f"{path}: expected one file, got another while it was read")
        return image

    def _image_of(
        self, adapter: Adapter, patience_seconds: float, read: _Read | None = None
    ) -> Image:
        image = self._store.find(adapter.digest)
        if image is None:
            layout = layout_of(adapter, self._shape, self._modules, self._dtype, self._max_rank)
            builder = self._build(layout, adapter.digest, patience_seconds, read)
            fill(builder, adapter, self._modules)
            image = self._store.insert(builder)
        if image.layout.dtype != dtype_name(self._dtype):
            raise InvalidArgumentError(
                f"store: expected images of {dtype_name(self._dtype)}, got one of"
                f" {image.layout.dtype} for digest {adapter.digest[:12]};"
                " a store serves one base model in one dtype"
            )
        return image

    def _build(
        self, layout: AdapterLayout, digest: str, patience_seconds: float, read: _Read | None
    ) -> ImageBuilder:
        """Waits in slices, in order to see that the read was cancelled."""
        end = time.monotonic() + patience_seconds
        while True:
            left = end - time.monotonic()
            try:
                return self._store.build(layout, digest, min(max(left, 0.0), _CANCEL_SECONDS))
            except StoreFullError:
                if read is not None:
                    self._check_wanted(read)
                if left <= _CANCEL_SECONDS:
                    raise

    def _check_wanted(self, read: _Read) -> None:
        if self._closed.is_set():
            raise _closed_error()
        if read.is_cancelled:
            raise CancelledError("adapter: expected somebody who waits for it, got none any more")


def _end_reads(
    closed: threading.Event,
    lock: threading.Lock,
    reads: dict[_ReadKey, _Read],
    threads: _Threads,
) -> None:
    with lock:
        closed.set()
        pending = list(reads.values())
        for read in pending:
            read.cancel()
    threads.shutdown()
    reads.clear()
    for read in pending:
        if not read.future.done():  # never begun
            read.future.set_exception(_closed_error())


def _check_exists(path: Path) -> None:
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a null character"
        raise AdapterFormatError(
            f"adapter: expected a PEFT folder or a packed file, got {reason} ({path})"
        ) from None


def _closed_error() -> CancelledError:
    return CancelledError("adapter library: expected an open one, got a closed one")
