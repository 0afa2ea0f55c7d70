# SPDX-License-Identifier: Apache-2.0
"""The slots of mode "cached": every adapter is loaded when it is added, and stays pinned."""

from collections.abc import Sequence
from dataclasses import dataclass

from toppings._runtime import Image, SlotTable, Ticket
from toppings.attachment import AttachedModel
from toppings.engine.request import Request

__all__ = ["CachedSlots"]


@dataclass(frozen=True)
class _Pinned:
    slots: SlotTable
    slot: int
    ticket: Ticket | None

    def wait(self) -> None:
        """Until it is loaded; gives the slot back when that fails."""
        try:
            if self.ticket is not None:
                self.ticket.wait_for_all()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self.slots.release(self.slot)


class CachedSlots:
    """Which slot is pinned for which name. A slot is never waited for in this mode, so a removed
    adapter keeps its own until the last request for it has ended.
    """

    def __init__(self, attached: AttachedModel) -> None:
        self._slots, self._loader = attached.slots, attached.loader
        self.by_name: dict[str, int] = {}
        self._retired: list[int] = []

    def pin(self, image: Image) -> _Pinned:
        """Raises SlotsBusyError when none is free."""
        slot, resident = self._slots.acquire(image)
        try:
            return _Pinned(self._slots, slot, None if resident else self._loader.load(slot))
        except BaseException:
            self._slots.release(slot)
            raise

    def assign(self, name: str, pinned: _Pinned, requests: Sequence[Request]) -> None:
        self.forget(name, requests)
        self.by_name[name] = pinned.slot

    def forget(self, name: str, requests: Sequence[Request]) -> None:
        slot = self.by_name.pop(name, None)
        if slot is not None:
            self._retired.append(slot)
            self.release_retired(requests)

    def release_retired(self, requests: Sequence[Request]) -> None:
        needed = {r.image.digest for r in requests if r.image is not None}
        kept = {s for s in map(self._slots.find, needed) if s >= 0}
        for slot in [s for s in self._retired if s not in kept]:
            self._slots.release(slot)
        self._retired = [s for s in self._retired if s in kept]
