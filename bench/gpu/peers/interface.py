# SPDX-License-Identifier: Apache-2.0
"""What a measured implementation has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gpu.cases import Case
from gpu.inputs import Inputs

Run = Callable[[int], object]  # run(n) does call n of the inputs


@dataclass(frozen=True)
class Absent:
    name: str
    reason: str  # one line

    @classmethod
    def because(cls, name: str, error: BaseException) -> Absent:
        return cls(name, one_line(error))


def one_line(error: BaseException, most: int = 160) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:most]


class Peer(Protocol):
    name: str
    version: str
    sorted: bool  # reads x_sorted and adds to y_sorted, instead of x and y

    def supports(self, case: Case) -> bool: ...

    def prepare(self, inputs: Inputs) -> Run:
        """Everything that a server does once, at load or once a step; not timed."""
