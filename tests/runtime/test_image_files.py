# SPDX-License-Identifier: Apache-2.0
"""Packed image files and their background reader, as _runtime.pyi promises them."""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from toppings import _runtime, errors
from toppings._runtime import AdapterLayout, HostStore, Image, ImageReader, ModelShape

SHAPE = ModelShape([[("q", 24, 40), ("k", 24, 8)], [], [("o", 40, 24)]])
RANKS = [[3, 0], [], [1]]
BUDGET = 1 << 20


def add(store: HostStore, digest: str, dtype: str = "bfloat16") -> Image:
    generator = torch.Generator().manual_seed(len(digest))
    builder = store.build(AdapterLayout(SHAPE, dtype, RANKS), digest)
    for layer, row in enumerate(RANKS):
        for i, rank in enumerate(row):
            if rank > 0:
                _, k, n = SHAPE.layer(layer)[i]
                a = torch.randn(rank, k, generator=generator)
                b = torch.randn(n, rank, generator=generator)
                builder.set(layer, i, a, b, 0.1 * rank)
    return store.insert(builder)


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "adapter.toppings")
    _runtime.write_image(add(HostStore(BUDGET), "digest"), path)
    return path


def assert_equal(image: Image, other: Image) -> None:
    assert image.digest == other.digest and image.layout.dtype == other.layout.dtype
    for layer in range(SHAPE.num_layers):
        ours, theirs = from_dlpack(image.layer_data(layer)), from_dlpack(other.layer_data(layer))
        assert torch.equal(ours, theirs)
        for i in range(len(SHAPE.layer(layer))):
            assert image.scale(layer, i) == other.scale(layer, i)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_image_comes_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    image = add(HostStore(BUDGET), "näme", dtype)
    path = str(tmp_path / "ä.toppings")
    _runtime.write_image(image, path)
    assert [file.name for file in tmp_path.iterdir()] == ["ä.toppings"]
    header = _runtime.read_image_header(path)
    assert header.digest == "näme" and header.layout.dtype == dtype
    assert header.layout.bytes == image.bytes
    assert header.scales == [image.scale(0, 0), 0.0, image.scale(2, 0)]
    shape = header.layout.shape
    assert [shape.layer(layer) for layer in range(3)] == [SHAPE.layer(layer) for layer in range(3)]
    assert [header.layout.rank(*at) for at in ((0, 0), (0, 1), (2, 0))] == [3, 0, 1]
    store = HostStore(BUDGET)
    read = ImageReader(store).read(path, SHAPE)
    found = read.wait()
    assert found is not None
    assert_equal(found, image)
    assert read.done and read.bytes_read == read.bytes_total == image.bytes
    assert store.find("näme") is found


def test_error_classes(path: str, tmp_path: Path) -> None:
    reader = ImageReader(HostStore(BUDGET))
    valid = Path(path).read_bytes()
    with pytest.raises(errors.FileError, match="none: expected .* got No such file"):
        _runtime.read_image_header(str(tmp_path / "none"))
    with pytest.raises(errors.FileError):
        reader.read(str(tmp_path)).wait()
    with pytest.raises(errors.FileError):
        _runtime.write_image(add(HostStore(BUDGET), "x"), str(tmp_path / "no" / "folder"))
    for damaged, error in [
        (valid[:-1], errors.AdapterFormatError),
        (valid[:-1] + bytes([valid[-1] ^ 1]), errors.AdapterFormatError),
        (b"", errors.AdapterFormatError),
        (valid[:8] + b"\2" + valid[9:], errors.UnsupportedAdapterError),
    ]:
        Path(path).write_bytes(damaged)
        with pytest.raises(error, match="expected"):
            reader.read(path).wait()
    Path(path).write_bytes(valid)
    with pytest.raises(errors.AdapterMismatchError):
        reader.read(path, ModelShape([[("q", 1, 1)]])).wait()
    store = HostStore(BUDGET)
    held = add(store, "digest", "float16")
    with pytest.raises(errors.InvalidArgumentError, match="layout"):
        ImageReader(store).read(path).wait()
    assert store.find("digest") is held
    for arguments in [(store, 0), (None, 1)]:
        with pytest.raises((errors.InvalidArgumentError, TypeError)):
            ImageReader(*arguments)  # type: ignore[arg-type]


def test_a_digest_has_one_dtype() -> None:
    store = HostStore(BUDGET)
    held = add(store, "a")
    with pytest.raises(errors.InvalidArgumentError, match=r"image a: .* float16"):
        add(store, "a", "float16")
    assert store.find("a") is held and store.stats().used_bytes == held.bytes


def test_a_full_store(path: str) -> None:
    size = _runtime.read_image_header(path).layout.bytes
    store = HostStore(size)
    held = add(store, "held")
    reader = ImageReader(store, 1)
    with pytest.raises(errors.StoreFullError):
        reader.read(path).wait()
    with pytest.raises(errors.StoreFullError):
        store.build(held.layout, "other", patience_seconds=0.01)
    with pytest.raises(errors.InvalidArgumentError, match="seconds"):
        reader.read(path, patience_seconds=float("nan"))
    read = reader.read(path, patience_seconds=float("inf"))
    assert read.wait(0.05) is None and not read.done
    assert read.bytes_total == size and read.bytes_read == 0
    del held
    found = read.wait(60)
    assert found is not None and found.digest == "digest"


def test_building_waits_for_room() -> None:
    layout = AdapterLayout(SHAPE, "float32", RANKS)
    store = HostStore(layout.bytes)
    held = [add(store, "held")]
    timer = threading.Timer(0.05, held.clear)
    timer.start()
    store.build(layout, "next", patience_seconds=60)  # the GIL is free meanwhile
    timer.join()


def test_cancelling(path: str) -> None:
    store = HostStore(_runtime.read_image_header(path).layout.bytes)
    held = add(store, "held")
    reader = ImageReader(store, 1)
    reads = [reader.read(path, patience_seconds=3600) for _ in range(3)]
    reads[2].cancel()
    with pytest.raises(errors.CancelledError):
        reads[2].wait(0)
    reads[0].cancel()
    with pytest.raises(errors.CancelledError):
        reads[0].wait()
    del reader  # its reads keep it
    assert reads[1].wait(0.05) is None
    reads[1].cancel()
    with pytest.raises(errors.CancelledError):
        reads[1].wait()
    assert store.stats().used_bytes == held.bytes


def test_waiting_can_be_interrupted(path: str) -> None:
    store = HostStore(_runtime.read_image_header(path).layout.bytes)
    held = add(store, "held")
    reader = ImageReader(store, 1)
    read = reader.read(path, patience_seconds=3600)

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            read.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not read.done and held.digest == "held"


def test_reading_leaves_the_interpreter_free(path: str) -> None:
    store = HostStore(_runtime.read_image_header(path).layout.bytes)
    held = [add(store, "held")]
    reader = ImageReader(store, 1)
    read = reader.read(path, patience_seconds=3600)
    steps = 0

    def work() -> None:
        nonlocal steps
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            steps += 1
        held.clear()

    thread = threading.Thread(target=work)
    thread.start()
    assert read.wait() is not None
    thread.join()
    assert steps > 100
