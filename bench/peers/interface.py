# SPDX-License-Identifier: Apache-2.0
"""What a measured implementation has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cases import Case
from inputs import Inputs

Run = Callable[[int], object]  # run(n) does call n of the inputs


@dataclass(frozen=True)
class Absent:
    name: str
    reason: str  # and how to get it


class Peer(Protocol):
    name: str
    version: str
    sorted: bool  # reads x_sorted and adds to y_sorted, instead of x and y

    def supports(self, case: Case) -> bool: ...

    def prepare(self, inputs: Inputs) -> Run:
        """Everything that a server does once, at load or once a step; not timed."""
