# SPDX-License-Identifier: Apache-2.0
"""The Python face of the runtime: store, arena and slots as _runtime.pyi promises them."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from toppings import _runtime, errors

# Two projections that share their input, nothing, one.
LAYERS = [[("q", 24, 40), ("k", 24, 8)], [], [("o", 40, 24)]]
RANKS = [[3, 2], [], [1]]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPE = _runtime.ModelShape(LAYERS)

Blocks = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]


def random_blocks(ranks: list[list[int]], seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, i): (
            torch.randn(rank, LAYERS[layer][i][1], generator=generator),
            torch.randn(LAYERS[layer][i][2], rank, generator=generator),
        )
        for layer, row in enumerate(ranks)
        for i, rank in enumerate(row)
        if rank > 0
    }


def add(
    store: _runtime.HostStore,
    digest: str,
    ranks: list[list[int]] = RANKS,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> _runtime.Image:
    builder = store.build(_runtime.AdapterLayout(SHAPE, dtype, ranks), digest)
    for (layer, i), (a, b) in random_blocks(ranks, seed).items():
        builder.set(layer, i, a, b, 1.5)
    return store.insert(builder)


def load(table: _runtime.SlotTable, slot: int) -> None:
    assert _runtime.Loader(table).load(slot).wait_for_all(20)


@pytest.fixture
def store() -> _runtime.HostStore:
    return _runtime.HostStore(1 << 20)


@pytest.fixture
def arena() -> _runtime.Arena:
    return _runtime.Arena(3, 1000, "bfloat16")


def test_versions() -> None:
    assert _runtime.version().split(".")[0].isdigit()
    assert _runtime.abi_version() == 1
    assert isinstance(_runtime.built_with_cuda(), bool)


def test_model_shape() -> None:
    assert (SHAPE.num_layers, SHAPE.num_rows) == (3, 3)
    assert [SHAPE.layer(layer) for layer in range(3)] == LAYERS
    assert SHAPE.row(2, 0) == 2
    with pytest.raises(errors.InvalidArgumentError, match="layer: expected .*, got 3"):
        SHAPE.layer(3)


def test_adapter_layout() -> None:
    layout = _runtime.AdapterLayout(SHAPE, "bfloat16", RANKS)
    assert [layout.layer_bytes(layer) for layer in range(3)] == [512, 0, 128]
    assert (layout.bytes, layout.max_layer_bytes, layout.max_rank) == (640, 512, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_image_holds_the_blocks(store: _runtime.HostStore, source: str, dtype: str) -> None:
    builder = store.build(_runtime.AdapterLayout(SHAPE, dtype, [[3, 0], [], [1]]), "a")
    blocks = {
        key: (a.to(DTYPES[source]), b.to(DTYPES[source]))
        for key, (a, b) in random_blocks([[3, 0], [], [1]], 0).items()
    }
    for (layer, i), (a, b) in blocks.items():
        builder.set(layer, i, a, b, 0.5 + layer)
    image = store.insert(builder)
    for (layer, _), (a, b) in blocks.items():
        data = from_dlpack(image.layer_data(layer))
        assert data.dtype == DTYPES[dtype]
        expected = torch.cat([a.flatten(), b.T.flatten()]).to(DTYPES[dtype])
        assert torch.equal(data[: expected.numel()], expected)
    assert image.digest == "a"
    assert image.bytes == image.layout.bytes
    assert [image.scale(0, 0), image.scale(0, 1), image.scale(2, 0)] == [0.5, 0, 2.5]
    assert from_dlpack(image.layer_data(1)).numel() == 0


def test_builder_checks_tensors(store: _runtime.HostStore) -> None:
    builder = store.build(_runtime.AdapterLayout(SHAPE, "float16", RANKS), "a")
    a, b = random_blocks(RANKS, 0)[0, 0]
    cases = [
        ((0, 0, a[:2], b), r"layer 0, 'q', a: expected shape \[3, 24\], got \[2, 24\]"),
        ((0, 0, a, b.T), r"layer 0, 'q', b: expected shape \[40, 3\], got \[3, 40\]"),
        ((0, 0, a[0], b), r"expected shape \[3, 24\], got \[24\]"),
        ((0, 0, a.T.contiguous().T, b), "expected a contiguous tensor, got a strided one"),
        ((0, 0, a.double(), b), "expected float32, float16 or bfloat16, got DLPack type code 2"),
        ((0, 0, a, b.half()), "b: expected a's float32, got float16"),
        ((0, 0, a.tolist(), b), "a: expected a tensor with __dlpack__, got <class 'list'>"),
        ((0, 0, a * 1e6, b), "layer 0, 'q'.*"),  # beyond float16
        ((1, 0, a, b), "projection: expected"),
    ]
    for args, message in cases:
        with pytest.raises(errors.InvalidArgumentError, match=message):
            builder.set(*args, 1.0)
    with pytest.raises(errors.InvalidArgumentError, match="scale: expected a finite number"):
        builder.set(0, 0, a, b, float("nan"))
    builder.set(0, 0, a, b, 1.0)
    with pytest.raises(errors.InvalidArgumentError, match="once"):
        builder.set(0, 0, a, b, 1.0)
    with pytest.raises(errors.InvalidArgumentError, match="layer 0, 'k': expected a block"):
        store.insert(builder)


def test_builder_is_empty_afterwards(store: _runtime.HostStore) -> None:
    builder = store.build(_runtime.AdapterLayout(SHAPE, "float32", [[1, 0], [], [0]]), "a")
    a, b = random_blocks([[1, 0], [], [0]], 0)[0, 0]
    builder.set(0, 0, a, b, 1.0)
    store.insert(builder)
    with pytest.raises(errors.InvalidArgumentError, match="isn't finished"):
        builder.set(0, 0, a, b, 1.0)
    with pytest.raises(errors.InvalidArgumentError, match="isn't finished"):
        store.insert(builder)


def test_builder_takes_numpy_arrays(store: _runtime.HostStore) -> None:
    builder = store.build(_runtime.AdapterLayout(SHAPE, "float32", [[1, 0], [], [0]]), "a")
    a, b = random_blocks([[1, 0], [], [0]], 0)[0, 0]
    builder.set(0, 0, a.numpy(), b.numpy(), 1.0)
    data = from_dlpack(store.insert(builder).layer_data(0))
    assert torch.equal(data[:24], a[0])


def test_store_evicts_what_is_idle(store: _runtime.HostStore) -> None:
    store = _runtime.HostStore(2 * 640)
    held = add(store, "a")
    add(store, "b")
    assert store.stats() == _runtime.HostStoreStats(2 * 640, 2 * 640, 2, 0)
    add(store, "c")
    assert store.find("b") is None
    assert store.find("a") is held
    assert store.stats().evictions == 1
    tensor = from_dlpack(held.layer_data(0))
    del held
    gc.collect()
    assert store.erase("a")
    assert not store.erase("a")
    assert store.stats().used_bytes == 2 * 640  # the tensor still holds the image
    del tensor
    assert store.stats().used_bytes == 640


def test_error_classes(store: _runtime.HostStore, arena: _runtime.Arena) -> None:
    layout = _runtime.AdapterLayout(SHAPE, "bfloat16", RANKS)
    with pytest.raises(errors.InvalidArgumentError, match="dtype"):
        _runtime.AdapterLayout(SHAPE, "int8", RANKS)
    with pytest.raises(errors.AdapterMismatchError, match="ranks: expected 3 layers, got 1"):
        _runtime.AdapterLayout(SHAPE, "bfloat16", [[1, 1]])
    full = _runtime.HostStore(640)
    held = add(full, "a")
    with pytest.raises(errors.StoreFullError, match="host store: expected .*, got 0 of 640"):
        full.build(layout, "b")
    with pytest.raises(MemoryError):
        _runtime.Arena(1, 1 << 60, "float32")
    table = _runtime.SlotTable(SHAPE, arena, 1)
    table.acquire(held)
    with pytest.raises(errors.SlotsBusyError, match="1 of 1 slots pinned"):
        table.acquire(add(store, "b"))
    with pytest.raises(errors.AdapterMismatchError, match="the arena's bfloat16, got float16"):
        table.acquire(add(store, "c", dtype="float16"))
    with pytest.raises(TypeError):
        table.acquire(None)  # type: ignore[arg-type]


def test_slots_follow_loading(store: _runtime.HostStore, arena: _runtime.Arena) -> None:
    table = _runtime.SlotTable(SHAPE, arena, 4)
    slots, scales = from_dlpack(table.slots()), from_dlpack(table.scales())
    assert (slots.dtype, slots.shape) == (torch.int64, (3, 4, 3))
    assert (scales.dtype, scales.shape) == (torch.float32, (3, 4))
    other, image = add(store, "other", [[1, 0], [], [0]]), add(store, "image")
    load(table, table.acquire(other)[0])
    slot, resident = table.acquire(image)
    assert (slot, resident) == (1, False)
    assert not slots[:, slot].any()
    load(table, slot)
    assert slots[:, slot, 2].tolist() == [3, 2, 1]
    assert scales[:, slot].tolist() == [1.5, 1.5, 1.5]
    for (layer, i), (a, b) in random_blocks(RANKS, 0).items():
        weights = from_dlpack(arena.layer(layer))
        at_a, at_b, rank = slots[SHAPE.row(layer, i), slot].tolist()
        assert torch.equal(weights[at_a : at_a + a.numel()], a.bfloat16().flatten())
        assert torch.equal(weights[at_b : at_b + b.numel()], b.bfloat16().T.flatten())
        assert rank == a.shape[0]
    assert table.acquire(image) == (slot, True)
    assert table.find("image") == slot
    assert table.find("none") == -1


def test_eviction_clears_the_rows(store: _runtime.HostStore, arena: _runtime.Arena) -> None:
    table = _runtime.SlotTable(SHAPE, arena, 4)
    slots = from_dlpack(table.slots())
    slot, _ = table.acquire(add(store, "a"))
    load(table, slot)
    table.release(slot)
    assert table.stats() == _runtime.SlotTableStats(4, 1, 0, 1024, 512, 0)
    large = add(store, "large", [[4, 0], [], [0]], seed=1), add(store, "b", seed=2)
    assert all(table.can_acquire(image) for image in large)
    assert table.acquire(large[0])[0] != slot
    assert table.acquire(large[1])[0] == slot  # "a" had to go
    assert not slots[:, slot].any()
    assert table.find("a") == -1
    assert table.stats().evictions == 1
    assert not table.can_acquire(add(store, "c"))
    table.release(slot)
    with pytest.raises(errors.InvalidArgumentError, match="expected a pinned one, got an idle one"):
        table.release(slot)


def test_tensors_outlive_their_owners(store: _runtime.HostStore) -> None:
    arena = _runtime.Arena(3, 1 << 20, "bfloat16")
    table = _runtime.SlotTable(SHAPE, arena, 2)
    load(table, table.acquire(add(store, "a"))[0])
    weights, slots = from_dlpack(arena.layer(0)), from_dlpack(table.slots())
    expected = weights[:100].clone(), slots.clone()
    del arena, table, store
    gc.collect()
    assert torch.equal(weights[:100], expected[0])
    assert torch.equal(slots, expected[1])
    weights.fill_(1)  # still ours to write


def test_arena_layers_are_one_memory(arena: _runtime.Arena) -> None:
    assert (arena.num_layers, arena.bytes_per_layer) == (3, 1024)
    first, again = from_dlpack(arena.layer(1)), from_dlpack(arena.layer(1))
    assert first.shape == (512,)
    first[3] = 7
    assert again[3] == 7
    assert first.data_ptr() % 64 == 0
    assert not from_dlpack(arena.layer(0)).any()


def test_dlpack_protocol(arena: _runtime.Arena) -> None:
    array = arena.layer(0)
    assert array.__dlpack_device__() == (1, 0)
    assert '"dltensor"' in repr(array.__dlpack__())
    assert '"dltensor"' in repr(array.__dlpack__(max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(array.__dlpack__(max_version=(1, 0)))
    assert '"dltensor_versioned"' in repr(
        array.__dlpack__(stream=None, max_version=(2, 1), dl_device=(1, 0), copy=False)
    )
    for kwargs in ({"copy": True}, {"dl_device": (2, 0)}, {"stream": 1}):
        with pytest.raises(BufferError):
            array.__dlpack__(**kwargs)


def test_threads_share_a_store() -> None:
    store = _runtime.HostStore(6 * 640)  # every thread holds an image and builds another

    def work(offset: int) -> None:
        for step in range(150):
            digest = str((step * 7 + offset) % 8)
            image = store.find(digest) or add(store, digest, seed=int(digest))
            a = random_blocks(RANKS, int(digest))[0, 0][0].bfloat16()
            assert torch.equal(from_dlpack(image.layer_data(0))[:72], a.flatten())

    with ThreadPoolExecutor(3) as pool:
        for result in [pool.submit(work, offset) for offset in range(3)]:
            result.result()
    assert store.stats().evictions > 0
    assert store.stats().used_bytes == store.stats().images * 640
