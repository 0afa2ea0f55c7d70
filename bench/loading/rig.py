# SPDX-License-Identifier: Apache-2.0
"""A loader with images of equal layers that take turns in an arena, so that none is there yet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

import torch

from loading.cases import MB, Link
from loading.rounds import on_core
from toppings import _runtime

WIDTH = 127  # with one column out, a rank row is 256 bytes
ROW_BYTES = 2 * (WIDTH + 1)


@dataclass(frozen=True)
class Cores:
    """Kept apart: who waits or computes, and who copies (link, loader)."""

    compute: int
    link: int


@dataclass(frozen=True)
class LoadTimes:
    """Seconds from load() on, and what the first copy took on the device."""

    first: float
    total: float
    transfer: float


def open_device(kind: str, link: Link, cores: Cores) -> _runtime.Device:
    if kind == "cuda":
        return _runtime.Device.cuda(0)
    if link.bytes_per_second is None:
        return _runtime.Device.host()
    return _runtime.Device.host(link.bytes_per_second, link.latency_seconds, cores.link)


class Rig:
    def __init__(
        self,
        device: _runtime.Device,
        cores: Cores,
        layers: int,
        block_bytes: int,
        images: int = 3,
        room: int = 1,
    ) -> None:
        """images: more than room, the adapters that fit the arena at once."""
        if block_bytes % ROW_BYTES != 0 or images <= room:
            raise ValueError(f"rig: expected whole rows and more images than room, got {images}")
        shape = _runtime.ModelShape([[("p", WIDTH, 1)]] * layers)
        rank = block_bytes // ROW_BYTES
        layout = _runtime.AdapterLayout(shape, "bfloat16", [[rank]] * layers)
        self.layers, self.bytes = layers, layout.bytes
        # Threads of a device without a link have no core of their own, but inherit one.
        with on_core(cores.link):
            self.store = _runtime.HostStore(images * layout.bytes + MB, device)
            self.arena = _runtime.Arena(layers, room * block_bytes, "bfloat16", device)
            self.table = _runtime.SlotTable(shape, self.arena, room)
            self.loader = _runtime.Loader(self.table, cpu=cores.link)
        a = torch.ones(rank, WIDTH, dtype=torch.bfloat16)
        b = torch.ones(1, rank, dtype=torch.bfloat16)
        self._images = [self._build(layout, f"{n}", a * (n + 1), b) for n in range(images)]
        self._turns = cycle(self._images)

    def acquire(self) -> int:
        """A pinned slot with an adapter that isn't loaded."""
        for _ in self._images:
            slot, resident = self.table.acquire(next(self._turns))
            if not resident:
                return slot
            self.table.release(slot)
        raise RuntimeError("rig: expected an adapter that was evicted, got none")

    def load(self) -> LoadTimes:
        slot = self.acquire()
        start = perf_counter()
        ticket = self.loader.load(slot)
        ticket.wait_for(0)
        first = perf_counter()
        ticket.wait_for_all()
        end = perf_counter()
        transfer = ticket.times()[0].transfer
        self.table.release(slot)
        return LoadTimes(first - start, end - start, transfer)

    def _build(
        self, layout: _runtime.AdapterLayout, digest: str, a: torch.Tensor, b: torch.Tensor
    ) -> _runtime.Image:
        builder = self.store.build(layout, digest)
        for layer in range(self.layers):
            builder.set(layer, 0, a, b, 1.0)
        return self.store.insert(builder)
