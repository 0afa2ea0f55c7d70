# SPDX-License-Identifier: Apache-2.0
"""Loading as Python sees it, on main memory, behind an emulated link, and on a GPU where there is
one.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from toppings import _runtime, errors

NUM_LAYERS, WIDTH, RANK = 6, 96, 32
SHAPE = _runtime.ModelShape([[("q", WIDTH, WIDTH), ("v", WIDTH, 32)]] * NUM_LAYERS)
LAYOUT = _runtime.AdapterLayout(SHAPE, "bfloat16", [[RANK, RANK // 2]] * NUM_LAYERS)
LAYER_BYTES = LAYOUT.layer_bytes(0)
SLOW = 0.01  # seconds a layer takes on the slow link


def slow_link() -> _runtime.Device:
    return _runtime.Device.host(LAYER_BYTES / SLOW)


@dataclass
class Setup:
    device: _runtime.Device
    store: _runtime.HostStore
    arena: _runtime.Arena
    table: _runtime.SlotTable
    loader: _runtime.Loader

    def add(self, seed: int) -> _runtime.Image:
        generator = torch.Generator().manual_seed(seed)
        builder = self.store.build(LAYOUT, f"adapter {seed}")
        for layer in range(NUM_LAYERS):
            for i, (_, k, n) in enumerate(SHAPE.layer(layer)):
                rank = RANK // (1 + i)
                a = torch.randn(rank, k, generator=generator)
                builder.set(layer, i, a, torch.randn(n, rank, generator=generator), 1.0)
        return self.store.insert(builder)

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device.kind == "cuda" else 0

    def loaded(self, slot: int, image: _runtime.Image, layer: int) -> bool:
        """Does the slot's row lead to the image's bytes, for what the stream runs now?"""
        a, b, rank = from_dlpack(self.table.slots())[SHAPE.row(layer, 0), slot].tolist()
        if rank == 0:
            return False
        arena = from_dlpack(self.arena.layer(layer))
        block = torch.cat([arena[a : a + rank * WIDTH], arena[b : b + rank * WIDTH]]).cpu()
        return torch.equal(block, from_dlpack(image.layer_data(layer))[: block.numel()])


def make(device: _runtime.Device) -> Setup:
    store = _runtime.HostStore(1 << 22, device)
    arena = _runtime.Arena(NUM_LAYERS, 4 * LAYER_BYTES, "bfloat16", device)
    for layer in range(NUM_LAYERS):
        from_dlpack(arena.layer(layer)).fill_(math.nan)
    table = _runtime.SlotTable(SHAPE, arena, 4)
    return Setup(device, store, arena, table, _runtime.Loader(table))


@pytest.fixture(params=["host", "link", "cuda"])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "cuda":
        yield make(_runtime.Device.cuda(0))
    else:
        yield make(_runtime.Device.host() if request.param == "host" else slow_link())


def test_brings_the_bytes(setup: Setup) -> None:
    images = [setup.add(seed) for seed in range(3)]
    slots = [setup.table.acquire(image)[0] for image in images]
    tickets = [setup.loader.load(slot) for slot in slots]
    for image, slot, ticket in zip(images, slots, tickets, strict=True):
        assert ticket.slot == slot
        assert ticket.wait_for_all(20)
        assert (ticket.status, ticket.num_arrived) == ("loaded", NUM_LAYERS)
        setup.table.upload(setup.stream())
        assert all(setup.loaded(slot, image, layer) for layer in range(NUM_LAYERS))
        assert [times.bytes for times in ticket.times()] == [LAYER_BYTES] * NUM_LAYERS
        assert setup.table.acquire(image) == (slot, True)
    stats = setup.loader.stats()
    assert (stats.loads, stats.cancelled, stats.failed) == (3, 0, 0)
    assert stats.bytes == 3 * LAYOUT.bytes
    assert stats.queued_bytes == 0
    assert stats.bytes_per_second > 0


def test_layer_by_layer_in_stream_order(setup: Setup) -> None:
    image = setup.add(0)
    slot, resident = setup.table.acquire(image)
    assert not resident
    order = [*range(2, NUM_LAYERS), 0, 1]
    ticket = setup.loader.load(slot, "urgent", order)
    for layer in order:
        ticket.wait(layer, setup.stream())
        assert setup.loaded(slot, image, layer)
    assert ticket.wait_for_all(20)


def test_bad_arguments(setup: Setup) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="expected one with an adapter"):
        setup.loader.load(0)
    slot, _ = setup.table.acquire(setup.add(0))
    with pytest.raises(errors.InvalidArgumentError, match="priority: expected 'prefetch'"):
        setup.loader.load(slot, "first")
    with pytest.raises(errors.InvalidArgumentError, match="order: expected every layer"):
        setup.loader.load(slot, order=[0, 0])
    with pytest.raises(errors.InvalidArgumentError, match="layer: expected 0 <= index < 6"):
        setup.loader.load(slot).wait(NUM_LAYERS)


def test_waits_without_the_gil() -> None:
    setup = make(slow_link())
    ticket = setup.loader.load(setup.table.acquire(setup.add(0))[0])
    turns = 0
    done = threading.Event()

    def wait() -> None:
        ticket.wait(NUM_LAYERS - 1)
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not done.is_set():
        turns += 1
        done.wait(0.001)
    thread.join()
    assert turns > NUM_LAYERS  # each took a millisecond at most, the load took sixty


def test_times_out() -> None:
    setup = make(slow_link())
    ticket = setup.loader.load(setup.table.acquire(setup.add(0))[0])
    assert math.isinf(ticket.seconds_until(NUM_LAYERS - 1))
    start = monotonic()
    assert not ticket.wait_for(NUM_LAYERS - 1, 0.005)
    assert not ticket.wait_for_all(0)
    assert monotonic() - start < NUM_LAYERS * SLOW
    assert ticket.status == "loading"
    assert not ticket.has_arrived(NUM_LAYERS - 1)
    assert ticket.wait_for_all()
    assert ticket.seconds_until(NUM_LAYERS - 1) == 0


def test_cancels() -> None:
    setup = make(slow_link())
    image = setup.add(0)
    slot, _ = setup.table.acquire(image)
    ticket, other = setup.loader.load(slot), setup.loader.load(slot)
    ticket.cancel()
    with pytest.raises(errors.CancelledError, match="expected one under way, got a cancelled one"):
        ticket.wait(NUM_LAYERS - 1)
    assert other.status == "loading"
    other.cancel()
    assert other.num_arrived < NUM_LAYERS
    again = setup.loader.load(slot)
    again.wait(NUM_LAYERS - 1)
    assert setup.loaded(slot, image, NUM_LAYERS - 1)
    assert setup.loader.stats().cancelled == 1


def test_priorities() -> None:
    setup = make(slow_link())
    first = setup.loader.load(setup.table.acquire(setup.add(0))[0], "prefetch")
    second = setup.loader.load(setup.table.acquire(setup.add(1))[0], "normal")
    assert second.wait_for_all(20)
    assert first.num_arrived <= 4
    assert first.wait_for_all(20)


def test_images_are_used_in_place() -> None:
    store = _runtime.HostStore(1 << 22)
    arena = _runtime.Arena.in_place(store, NUM_LAYERS, "bfloat16")
    assert arena.is_in_place
    table = _runtime.SlotTable(SHAPE, arena, 2)
    setup = Setup(arena.device, store, arena, table, _runtime.Loader(table))
    images = [setup.add(seed) for seed in range(3)]
    slot, resident = table.acquire(images[0])
    assert resident
    assert all(setup.loaded(slot, images[0], layer) for layer in range(NUM_LAYERS))
    assert setup.loader.load(slot).status == "loaded"
    assert setup.loader.stats().bytes == 0
    table.acquire(images[1])
    with pytest.raises(errors.SlotsBusyError):
        table.acquire(images[2])
    table.release(slot)
    assert table.find("adapter 0") == -1  # nothing is lost, so it doesn't stay
    assert not from_dlpack(table.slots())[:, slot].any()
    assert table.acquire(images[2]) == (slot, True)
    with pytest.raises(errors.AdapterMismatchError, match="expected one of the arena's own store"):
        table.acquire(make(slow_link()).add(5))


def test_a_link_needs_copies() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="expected one whose device uses images"):
        _runtime.Arena.in_place(_runtime.HostStore(1 << 20, slow_link()), NUM_LAYERS, "bfloat16")
    assert "emulated" in slow_link().name
    assert not slow_link().is_in_place
