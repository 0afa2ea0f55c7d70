# SPDX-License-Identifier: Apache-2.0
"""The loader's own work per layer: overhead.cpp, compiled by `make bench`."""

from __future__ import annotations

import ctypes
from pathlib import Path

from machine import Load
from timing import Quartiles

from loading.results import Overhead
from loading.rig import Cores
from loading.rounds import on_core

LIBRARY = Path("build/bench/liboverhead.so")
WAITS = ("by the host", "in stream order")


def load_library(root: Path) -> ctypes.CDLL:
    path = root / LIBRARY
    if not path.exists():
        raise FileNotFoundError(f"{LIBRARY}: not there; `make bench` builds it")
    library = ctypes.CDLL(str(path))
    doubles = ctypes.POINTER(ctypes.c_double)
    library.toppings_loader_overhead.argtypes = [*[ctypes.c_int] * 4, doubles, doubles]
    library.toppings_loader_overhead.restype = ctypes.c_bool
    return library


def measure_overhead(
    library: ctypes.CDLL, layers: int, repeats: int, cores: Cores
) -> list[Overhead]:
    return [_measure(library, wait, layers, repeats, cores) for wait in range(len(WAITS))]


def _measure(library: ctypes.CDLL, wait: int, layers: int, repeats: int, cores: Cores) -> Overhead:
    wall, used = ((ctypes.c_double * repeats)() for _ in range(2))
    load = Load()
    with on_core(cores.compute):
        if not library.toppings_loader_overhead(wait, layers, repeats, cores.link, wall, used):
            raise RuntimeError("overhead: expected loads that succeed, got an error (see above)")
    return Overhead(
        waits=WAITS[wait],
        layers=layers,
        rounds=repeats,
        others_cores=round(load.others_cores(), 2),
        wall_us=Quartiles.of([1e6 * value for value in wall]),
        cpu_us=Quartiles.of([1e6 * value for value in used]),
    )
