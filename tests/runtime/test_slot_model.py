# SPDX-License-Identifier: Apache-2.0
"""Arena, slot table and loader against a model of a few lines: random operations, and after each
one everything that can be seen is compared. tests/soak.py runs many more of them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.utils.dlpack import from_dlpack

from toppings import _runtime, errors

# Two projections that share their input, nothing, two that don't fill 64 bytes, and more.
LAYERS = [
    [("q", 8, 8), ("k", 8, 24)],
    [],
    [("o", 5, 3), ("p", 16, 8)],
    [("d", 8, 8)],
    [("q", 8, 8)],
]
SHAPE = _runtime.ModelShape(LAYERS)
ITEM = 4  # bytes of a float32
GRANULE = 64
POISON = 0x5A5A5A5A
SECONDS = 20.0  # patience with what takes milliseconds


def random_ranks(seed: int, granules: int) -> list[list[int]]:
    """ranks[layer][projection]; the largest layer takes about so many granules."""
    random = Random(seed)
    ranks = [[0] * len(projections) for projections in LAYERS]
    for layer in random.sample([0, 2, 3, 4], random.randint(1, 4)):
        projections = LAYERS[layer]
        i = random.randrange(len(projections))
        _, width, out = projections[i]
        ranks[layer][i] = max(1, GRANULE * granules // (ITEM * (width + out)))
        if len(projections) == 2 and random.random() < 0.5:
            ranks[layer][1 - i] = random.randint(1, 2)
    return ranks


# From one granule to more than the largest arena; small ones are many.
GRANULES = [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 9, 11, 14, 18, 24, 32, 39, 44]
RANKS = [random_ranks(seed, granules) for seed, granules in enumerate(GRANULES)]


def rounded(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


@dataclass
class Adapter:
    ranks: list[list[int]]
    image: _runtime.Image
    layers: list[np.ndarray]  # its float32 numbers as int32, layer by layer
    places: list[list[tuple[int, int, int]]]  # [layer][projection]: A, B (bytes), rank
    layer_bytes: list[int]

    @property
    def need(self) -> int:
        return max(self.layer_bytes)

    def scale(self, layer: int, i: int) -> float:
        return self.ranks[layer][i] / 4


def make_adapter(store: _runtime.HostStore, number: int) -> Adapter:
    ranks = RANKS[number]
    generator = torch.Generator().manual_seed(number)
    builder = store.build(_runtime.AdapterLayout(SHAPE, "float32", ranks), f"adapter {number}")
    places, layers, layer_bytes = [], [], []
    for layer, projections in enumerate(LAYERS):
        cells, parts, offset = [], [], 0
        for i, (_, width, out) in enumerate(projections):
            rank = ranks[layer][i]
            a = torch.randn(rank, width, generator=generator)
            b = torch.randn(out, rank, generator=generator)
            if rank > 0:
                builder.set(layer, i, a, b, rank / 4)
            cells.append((offset, offset + ITEM * rank * width, rank))
            block = np.zeros(rounded(ITEM * rank * (width + out)) // ITEM, np.float32)
            flat = torch.cat([a.flatten(), b.T.flatten()]).numpy()
            block[: flat.size] = flat
            parts.append(block)
            offset += ITEM * block.size
        places.append(cells)
        layers.append(np.concatenate(parts or [np.zeros(0, np.float32)]).view(np.int32))
        layer_bytes.append(offset)
    return Adapter(ranks, store.insert(builder), layers, places, layer_bytes)


@dataclass
class Entry:
    number: int
    start: int
    size: int
    pins: int
    last_use: int
    published: set[int] = field(default_factory=set)


class Model:
    """Ranges and slots by brute force."""

    def __init__(self, size: int, num_slots: int) -> None:
        self.size = size
        self.num_slots = num_slots
        self.entries: dict[int, Entry] = {}
        self.clock = 0
        self.evictions = 0

    def find(self, number: int) -> int:
        return next((slot for slot, e in self.entries.items() if e.number == number), -1)

    def ranges(self) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, slot or None for a gap), the whole arena in address order."""
        position = 0
        for slot, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if entry.start > position:
                yield position, entry.start, None
            yield entry.start, entry.start + entry.size, slot
            position = entry.start + entry.size
        if position < self.size:
            yield position, self.size, None

    def first_gap(self, need: int) -> int | None:
        gaps = (a for a, b, slot in self.ranges() if slot is None and b - a >= need)
        return next(gaps, None)

    def cost(self, slot: int | None) -> float:
        if slot is None:
            return 0.0
        entry = self.entries[slot]
        age = max(self.clock - entry.last_use, 1)
        return float(sum(ADAPTERS[entry.number].layer_bytes)) / float(age)

    def victims(self, need: int) -> list[int] | None:
        """What to evict for an adapter of that many bytes per layer; None: there is no way."""
        has_room = self.first_gap(need) is not None
        if has_room and len(self.entries) < self.num_slots:
            return []
        ranges = list(self.ranges())
        best: tuple[float, int, list[int]] | None = None
        for first in range(len(ranges)):
            for last in range(first, len(ranges)):
                window = ranges[first : last + 1]
                slots = [slot for _, _, slot in window if slot is not None]
                if any(self.entries[slot].pins > 0 for slot in slots):
                    break
                if has_room and (len(window) != 1 or not slots):
                    continue
                if not has_room and window[-1][1] - window[0][0] < need:
                    continue
                cost = reduce(add, (self.cost(slot) for _, _, slot in window), 0.0)
                if best is None or (cost, window[0][0]) < best[:2]:
                    best = (cost, window[0][0], slots)
        return None if best is None else best[2]

    def touch(self, slot: int) -> None:
        self.clock += 1
        self.entries[slot].last_use = self.clock


STORE = _runtime.HostStore(1 << 22)
ADAPTERS = [make_adapter(STORE, number) for number in range(len(RANKS))]
DEVICES = [
    _runtime.Device.host(),
    _runtime.Device.host(bytes_per_second=2e9, latency_seconds=5e-5),
]
numbers = st.sampled_from(range(len(RANKS)))


def expected_rows(
    published: dict[int, tuple[Adapter, list[int], set[int]]], num_slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """published: slot -> adapter, where each of its layers starts (bytes), layers published."""
    rows = np.zeros((SHAPE.num_rows, num_slots, 3), np.int64)
    scales = np.zeros((SHAPE.num_rows, num_slots), np.float32)
    for slot, (adapter, starts, layers) in published.items():
        for layer in layers:
            for i, (a, b, rank) in enumerate(adapter.places[layer]):
                if rank > 0:
                    start = starts[layer]
                    row = SHAPE.row(layer, i)
                    rows[row, slot] = [(start + a) // ITEM, (start + b) // ITEM, rank]
                    scales[row, slot] = adapter.scale(layer, i)
    return rows, scales


def check_disjoint(rows: np.ndarray, arena_items: int) -> None:
    """What the rows of different slots point at lies in the arena and doesn't overlap."""
    for layer, projections in enumerate(LAYERS):
        parts = []
        for i, (_, width, out) in enumerate(projections):
            for slot, (a, b, rank) in enumerate(rows[SHAPE.row(layer, i)].tolist()):
                parts += [(a, a + rank * width, slot), (b, b + rank * out, slot)] if rank else []
        parts.sort()
        assert all(a >= 0 and b <= arena_items for a, b, _ in parts)
        assert all(p[1] <= q[0] for p, q in zip(parts, parts[1:], strict=False)), parts


class SlotMachine(RuleBasedStateMachine):
    @initialize(
        granules=st.integers(1, 40), num_slots=st.integers(1, 7), device=st.sampled_from([0, 1])
    )
    def start(self, granules: int, num_slots: int, device: int) -> None:
        self.arena = _runtime.Arena(len(LAYERS), GRANULE * granules, "float32", DEVICES[device])
        self.layers = [
            from_dlpack(self.arena.layer(layer)).numpy().view(np.int32)
            for layer in range(len(LAYERS))
        ]
        for data in self.layers:
            data.fill(POISON)
        self.table = _runtime.SlotTable(SHAPE, self.arena, num_slots)
        self.rows = from_dlpack(self.table.slots()).numpy()
        self.scales = from_dlpack(self.table.scales()).numpy()
        # Two copies ahead, so that a load that is cancelled stops somewhere.
        self.loader = _runtime.Loader(self.table, window_seconds=0.0)
        self.model = Model(GRANULE * granules, num_slots)

    def pinned(self) -> list[int]:
        return sorted(slot for slot, entry in self.model.entries.items() if entry.pins > 0)

    def acquire(self, number: int) -> int | None:
        """The slot, when there is one to be had."""
        model, adapter = self.model, ADAPTERS[number]
        if adapter.need > model.size:
            with pytest.raises(errors.InvalidArgumentError, match="at most the arena's"):
                self.table.acquire(adapter.image)
            return None
        slot = model.find(number)
        if slot >= 0:
            resident = len(model.entries[slot].published) == len(LAYERS)
            assert self.table.acquire(adapter.image) == (slot, resident)
            model.entries[slot].pins += 1
            model.touch(slot)
            return slot
        victims = model.victims(adapter.need)
        if victims is None:
            with pytest.raises(errors.SlotsBusyError):
                self.table.acquire(adapter.image)
            return None
        slot, resident = self.table.acquire(adapter.image)
        assert not resident
        for victim in victims:
            del model.entries[victim]
        model.evictions += len(victims)
        assert 0 <= slot < model.num_slots and slot not in model.entries
        start = model.first_gap(adapter.need)
        assert start is not None
        model.entries[slot] = Entry(number, start, adapter.need, 1, 0)
        model.touch(slot)
        return slot

    def release(self, slot: int) -> None:
        self.table.release(slot)
        self.model.entries[slot].pins -= 1
        self.model.touch(slot)

    def load(self, slot: int, order: list[int], cancel_after: int) -> None:
        entry = self.model.entries[slot]
        ticket = self.loader.load(slot, order=order)
        if cancel_after == len(LAYERS):
            assert ticket.wait_for_all(SECONDS)
            assert ticket.status == "loaded"
            published = set(range(len(LAYERS)))
        else:
            assert all(ticket.wait_for(layer, SECONDS) for layer in order[:cancel_after])
            ticket.cancel()
            deadline = time.monotonic() + SECONDS
            while self.loader.stats().queued_bytes > 0:  # copies that were under way
                assert time.monotonic() < deadline
            published = {
                layer for layer in range(len(LAYERS)) if self.table.is_published(slot, layer)
            }
            assert published >= entry.published | set(order[:cancel_after])
            complete = len(published) == len(LAYERS)
            assert ticket.status in (["loaded", "cancelled"] if complete else ["cancelled"])
        assert all(ticket.has_arrived(layer) for layer in published)
        entry.published = published
        self.model.touch(slot)  # the loader's own pin
        self.model.touch(slot)

    # How far a load goes. Mostly to its end.
    cancels = st.sampled_from([len(LAYERS)] * 4 + list(range(len(LAYERS))))
    orders = st.permutations(range(len(LAYERS)))

    @rule(number=numbers, order=orders, cancel_after=cancels, is_kept=st.sampled_from([0, 0, 1]))
    def use(self, number: int, order: list[int], cancel_after: int, is_kept: int) -> None:
        slot = self.acquire(number)
        if slot is None:
            return
        self.load(slot, order, cancel_after)
        if not is_kept:
            self.release(slot)

    @rule(numbers=st.lists(numbers, min_size=1, max_size=5))
    def touch(self, numbers: list[int]) -> None:
        for number in numbers:
            slot = self.acquire(number)
            if slot is not None:
                self.release(slot)

    @rule(number=numbers)
    def hold(self, number: int) -> None:
        self.acquire(number)

    @precondition(lambda self: self.pinned())
    @rule(choice=st.integers(0, 1 << 16))
    def let_go(self, choice: int) -> None:
        pinned = self.pinned()
        self.release(pinned[choice % len(pinned)])

    @precondition(lambda self: len(self.pinned()) > 2)
    @rule()
    def let_all_go(self) -> None:
        while pinned := self.pinned():
            self.release(pinned[0])

    @precondition(lambda self: self.pinned())
    @rule(choice=st.integers(0, 1 << 16), order=orders, cancel_after=cancels)
    def load_again(self, choice: int, order: list[int], cancel_after: int) -> None:
        pinned = self.pinned()
        self.load(pinned[choice % len(pinned)], order, cancel_after)

    @invariant()
    def agrees(self) -> None:
        model = self.model
        for slot in {-1, model.clock % model.num_slots, model.num_slots} - set(self.pinned()):
            with pytest.raises(errors.InvalidArgumentError):
                self.table.release(slot)
            with pytest.raises(errors.InvalidArgumentError):
                self.loader.load(slot)
        used = sum(entry.size for entry in model.entries.values())
        assert self.table.stats() == _runtime.SlotTableStats(
            slots=model.num_slots,
            resident=len(model.entries),
            pinned=len(self.pinned()),
            arena_bytes=model.size,
            used_bytes=used,
            evictions=model.evictions,
        )
        for number, adapter in enumerate(ADAPTERS):
            slot = model.find(number)
            assert self.table.find(adapter.image.digest) == slot
            if adapter.need > model.size:
                with pytest.raises(errors.InvalidArgumentError):
                    self.table.can_acquire(adapter.image)
            else:
                can = slot >= 0 or model.victims(adapter.need) is not None
                assert self.table.can_acquire(adapter.image) == can
        published = {
            slot: (ADAPTERS[entry.number], [entry.start] * len(LAYERS), entry.published)
            for slot, entry in model.entries.items()
        }
        rows, scales = expected_rows(published, model.num_slots)
        np.testing.assert_array_equal(self.rows, rows)
        np.testing.assert_array_equal(self.scales, scales)
        check_disjoint(self.rows, model.size // ITEM)
        for slot in range(model.num_slots):
            entry_ = model.entries.get(slot)
            layers = entry_.published if entry_ else set()
            for layer, data in enumerate(self.layers):
                assert self.table.is_published(slot, layer) == (layer in layers)
                if entry_ and layer in layers:
                    numbers_ = ADAPTERS[entry_.number].layers[layer]
                    first = entry_.start // ITEM
                    np.testing.assert_array_equal(data[first : first + numbers_.size], numbers_)

    def teardown(self) -> None:
        if hasattr(self, "loader"):
            stats = self.loader.stats()
            assert (stats.failed, stats.queued_bytes) == (0, 0)


class InPlaceMachine(RuleBasedStateMachine):
    """An arena without memory of its own: a slot is there while it is pinned."""

    @initialize(num_slots=st.integers(1, 7))
    def start(self, num_slots: int) -> None:
        self.store = _runtime.HostStore(1 << 16)
        self.arena = _runtime.Arena.in_place(self.store, len(LAYERS), "float32")
        self.data = from_dlpack(self.arena.layer(0)).numpy()
        self.table = _runtime.SlotTable(SHAPE, self.arena, num_slots)
        self.rows = from_dlpack(self.table.slots()).numpy()
        self.scales = from_dlpack(self.table.scales()).numpy()
        self.loader = _runtime.Loader(self.table)
        self.pins: dict[int, tuple[int, Adapter, int]] = {}  # slot -> number, adapter, pins
        self.num_slots = num_slots

    @rule(number=numbers)
    def acquire(self, number: int) -> None:
        found = self.store.find(f"adapter {number}")
        if found is None:
            adapter = make_adapter(self.store, number)
        else:
            known = ADAPTERS[number]
            adapter = Adapter(known.ranks, found, known.layers, known.places, known.layer_bytes)
        slots = [slot for slot, (other, _, _) in self.pins.items() if other == number]
        can = bool(slots) or len(self.pins) < self.num_slots
        assert self.table.can_acquire(adapter.image) == can
        if not can:
            with pytest.raises(errors.SlotsBusyError):
                self.table.acquire(adapter.image)
            return
        slot, resident = self.table.acquire(adapter.image)
        assert resident
        assert slots == [slot] if slots else slot not in self.pins
        # A slot keeps the image it has, also when the store has forgotten it and got another.
        _, kept, pins = self.pins.get(slot, (number, adapter, 0))
        self.pins[slot] = (number, kept, pins + 1)

    @rule(number=numbers)
    def another_stores_image(self, number: int) -> None:
        with pytest.raises(errors.AdapterMismatchError, match="own store"):
            self.table.acquire(ADAPTERS[number].image)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.pins)))
        number, adapter, pins = self.pins.pop(slot)
        self.table.release(slot)
        if pins > 1:
            self.pins[slot] = (number, adapter, pins - 1)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        ticket = self.loader.load(data.draw(st.sampled_from(sorted(self.pins))))
        assert (ticket.status, ticket.num_arrived) == ("loaded", len(LAYERS))

    @rule(number=numbers)
    def forget(self, number: int) -> None:
        """In the store alone: whoever uses the image keeps it."""
        self.store.erase(f"adapter {number}")

    @invariant()
    def agrees(self) -> None:
        stats = self.table.stats()
        assert (stats.slots, stats.resident, stats.pinned) == (
            self.num_slots,
            len(self.pins),
            len(self.pins),
        )
        published = {}
        for slot, (number, adapter, _) in self.pins.items():
            assert self.table.find(f"adapter {number}") == slot
            starts = [
                from_dlpack(adapter.image.layer_data(layer)).data_ptr() - self.data.ctypes.data
                if adapter.layer_bytes[layer]
                else 0
                for layer in range(len(LAYERS))
            ]
            published[slot] = (adapter, starts, set(range(len(LAYERS))))
        rows, scales = expected_rows(published, self.num_slots)
        np.testing.assert_array_equal(self.rows, rows)
        np.testing.assert_array_equal(self.scales, scales)
        check_disjoint(self.rows, self.data.size)
        for adapter, starts, layers in published.values():
            for layer in layers:
                first, numbers_ = starts[layer] // ITEM, adapter.layers[layer]
                data = self.data[first : first + numbers_.size].view(np.int32)
                np.testing.assert_array_equal(data, numbers_)

    def teardown(self) -> None:
        if hasattr(self, "loader"):
            assert self.loader.stats().layers == 0


def run(machine: type[RuleBasedStateMachine], operations: int, is_random: bool = False) -> None:
    """About that many operations, in sequences of 50. Random: others in every run."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(operations // 50, 1),
            stateful_step_count=50,
            derandomize=not is_random,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_slot_table_and_loader_agree_with_a_model() -> None:
    run(SlotMachine, 3000)


def test_in_place_agrees_with_a_model() -> None:
    run(InPlaceMachine, 1000)
