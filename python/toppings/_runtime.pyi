# SPDX-License-Identifier: Apache-2.0
"""The stateful runtime of libtoppings. dtypes are names: "float32", "float16", "bfloat16"."""

from typing import Any, NamedTuple

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
    def __init__(self, budget_bytes: int) -> None: ...
    def build(self, layout: AdapterLayout, digest: str) -> ImageBuilder:
        """Reserves the bytes, evicting idle images if need be.

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

class Arena:
    def __init__(self, num_layers: int, bytes_per_layer: int, dtype: str) -> None: ...
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
    def slots(self) -> DLPackArray:
        """int64 [num_rows, num_slots, 3], updated in place."""
    def scales(self) -> DLPackArray:
        """float32 [num_rows, num_slots], updated in place."""
    def stats(self) -> SlotTableStats: ...

def load(table: SlotTable, slot: int) -> None:
    """Copies every layer of a pinned slot into place and publishes it; releases the GIL.

    Layers that are published already are left alone.
    """

def version() -> str: ...
def abi_version() -> int: ...
def built_with_cuda() -> bool: ...
