# SPDX-License-Identifier: Apache-2.0
"""The stateful runtime of libtoppings. dtypes are names: "float32", "float16", "bfloat16"."""

from collections.abc import Sequence
from typing import Any, NamedTuple

class Device:
    """Where adapters live: memory, streams, events. One object stands for one device."""

    @staticmethod
    def host(
        bytes_per_second: float | None = None, latency_seconds: float = 0.0, cpu: int = -1
    ) -> Device:
        """Main memory; with a bandwidth, behind an emulated link (its threads pinned to core cpu).

        InvalidArgumentError: a bandwidth or latency not finite and positive; no such core.
        """
    @staticmethod
    def cuda(index: int) -> Device:
        """DeviceError: built without CUDA, no driver, or no such GPU."""
    @property
    def kind(self) -> str:
        """ "host" or "cuda"."""
    @property
    def name(self) -> str: ...
    @property
    def is_in_place(self) -> bool:
        """Adapters are used where their images lie, and nothing is copied."""

class ModelShape:
    """layers[l] lists (name, K, N) of every projection of layer l.

    Projections that share an input stand together.
    """

    def __init__(self, layers: list[list[tuple[str, int, int]]]) -> None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    def layer(self, layer: int) -> list[tuple[str, int, int]]: ...
    def row(self, layer: int, projection: int) -> int: ...

class AdapterLayout:
    """ranks[l][p]: the adapter's rank in projection p of layer l, 0 where it is absent."""

    def __init__(self, shape: ModelShape, dtype: str, ranks: list[list[int]]) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def max_layer_bytes(self) -> int: ...
    def layer_bytes(self, layer: int) -> int: ...
    @property
    def shape(self) -> ModelShape: ...
    @property
    def dtype(self) -> str: ...
    def rank(self, layer: int, projection: int) -> int: ...

class Image:
    @property
    def digest(self) -> str: ...
    @property
    def layout(self) -> AdapterLayout: ...
    @property
    def bytes(self) -> int: ...
    def scale(self, layer: int, projection: int) -> float: ...
    def layer_data(self, layer: int) -> DLPackArray:
        """The layer block, 1-D, of the image's dtype; read-only by contract."""

class ImageBuilder:
    def set(self, layer: int, projection: int, a: Any, b: Any, scale: float) -> None:
        """a [r, K], b [N, r]: contiguous CPU tensors of one dtype (anything with __dlpack__)."""

class HostStoreStats(NamedTuple):
    budget_bytes: int
    used_bytes: int
    images: int
    evictions: int

class HostStore:
    def __init__(self, budget_bytes: int, device: Device | None = None) -> None:
        """Images live in memory that `device` (default: main memory) copies from at full speed."""
    def build(
        self, layout: AdapterLayout, digest: str, patience_seconds: float = 0.0
    ) -> ImageBuilder:
        """Reserves the bytes, evicting idle images if need be, waiting for room so long.

        StoreFullError: images in use leave too little room.
        InvalidArgumentError: the whole budget is too small.
        """
    def insert(self, builder: ImageBuilder) -> Image:
        """Finishes the builder, which is empty afterwards."""
    def find(self, digest: str) -> Image | None: ...
    def erase(self, digest: str) -> bool: ...
    def stats(self) -> HostStoreStats: ...

class DLPackArray:
    """Memory of the runtime; torch.from_dlpack makes a tensor of it that keeps its owner alive."""

    def __dlpack__(self, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def write_image(image: Image, path: str) -> None:
    """Writes a packed image file, whole or not at all. FileError: it can't be written."""

class ImageFileHeader(NamedTuple):
    digest: str
    layout: AdapterLayout
    scales: list[float]
    """By row of the shape."""

def read_image_header(path: str) -> ImageFileHeader:
    """Checked as a whole. FileError, AdapterFormatError, UnsupportedAdapterError."""

class ImageRead:
    """A file being read in the background."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_total(self) -> int:
        """0 until the header has been read."""
    @property
    def done(self) -> bool: ...
    def wait(self, timeout_seconds: float | None = None) -> Image | None:
        """The image, or None when the time ran out; raises what made the read fail."""
    def cancel(self) -> None: ...

class ImageReader:
    """Reads packed image files into a store in the background. Its ImageReads keep it alive."""

    def __init__(self, store: HostStore, parallel_reads: int = 2) -> None: ...
    def read(
        self, path: str, shape: ModelShape | None = None, patience_seconds: float = 0.0
    ) -> ImageRead: ...

class Arena:
    def __init__(
        self, num_layers: int, bytes_per_layer: int, dtype: str, device: Device | None = None
    ) -> None: ...
    @staticmethod
    def in_place(store: HostStore, num_layers: int, dtype: str) -> Arena:
        """No memory of its own: adapters stay where their images lie in the store.

        InvalidArgumentError: the store's device isn't in place.
        """
    @property
    def is_in_place(self) -> bool: ...
    @property
    def device(self) -> Device: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def bytes_per_layer(self) -> int: ...
    def layer(self, layer: int) -> DLPackArray:
        """1-D, of the arena's dtype: `a` and `b` of every operator call in that layer."""

class SlotTableStats(NamedTuple):
    slots: int
    resident: int
    pinned: int
    arena_bytes: int
    used_bytes: int
    evictions: int

class SlotTable:
    def __init__(self, shape: ModelShape, arena: Arena, num_slots: int) -> None: ...
    def acquire(self, image: Image) -> tuple[int, bool]:
        """(slot, resident), pinned; load() it when it isn't resident.

        SlotsBusyError: nothing idle would make room now.
        AdapterMismatchError, InvalidArgumentError: it never fits.
        """
    def can_acquire(self, image: Image) -> bool:
        """Would acquire() succeed now? Raises for an image that never fits."""
    def release(self, slot: int) -> None: ...
    def find(self, digest: str) -> int:
        """The slot, or -1."""
    def is_published(self, slot: int, layer: int) -> bool: ...
    def slots(self) -> DLPackArray:
        """int64 [num_rows, num_slots, 3] in the arena's device memory, updated in place."""
    def scales(self) -> DLPackArray:
        """float32 [num_rows, num_slots], likewise."""
    def upload(self, stream: int = 0) -> None:
        """What is enqueued in the stream from now on sees the tables as they are now.

        stream: a cudaStream_t; 0 for the host. Nothing to do on the host.
        """
    def stats(self) -> SlotTableStats: ...

class LayerTimes(NamedTuple):
    queued: float
    transfer: float
    bytes: int

class LoaderStats(NamedTuple):
    loads: int
    cancelled: int
    failed: int
    layers: int
    bytes: int
    transfer_seconds: float
    queued_seconds: float
    bytes_per_second: float
    queued_bytes: int

class Ticket:
    """One caller's hold on a load; dropping it doesn't stop the load."""

    @property
    def slot(self) -> int: ...
    @property
    def status(self) -> str:
        """ "loading", "loaded", "cancelled" or "failed"."""
    @property
    def num_arrived(self) -> int: ...
    def has_arrived(self, layer: int) -> bool: ...
    def seconds_until(self, layer: int) -> float:
        """An estimate; 0 once the layer is there."""
    def wait(self, layer: int, stream: int = 0) -> None:
        """What is enqueued in the stream from now on finds the layer loaded and published.

        stream: a cudaStream_t, and the host doesn't wait; 0: the calling thread waits (host
        devices). CancelledError, or what made the load fail.
        """
    def wait_for(self, layer: int, timeout_seconds: float | None = None) -> bool:
        """Waits on the host; False when the time ran out."""
    def wait_for_all(self, timeout_seconds: float | None = None) -> bool: ...
    def cancel(self) -> None: ...
    def raise_priority(self, priority: str) -> None: ...
    def times(self) -> list[LayerTimes]: ...

class Loader:
    """Copies acquired slots layer by layer; every call that waits or copies releases the GIL."""

    def __init__(
        self, table: SlotTable, num_streams: int = 2, window_seconds: float = 3e-4, cpu: int = -1
    ) -> None: ...
    def load(
        self, slot: int, priority: str = "normal", order: Sequence[int] | None = None
    ) -> Ticket:
        """Begins to load a pinned slot. priority: "prefetch", "normal" or "urgent"."""
    def stats(self) -> LoaderStats: ...

def version() -> str: ...
def abi_version() -> int: ...
def built_with_cuda() -> bool: ...
