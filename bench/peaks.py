# SPDX-License-Identifier: Apache-2.0
"""What the machine reaches in this very run: peaks.cpp, compiled by `make bench`."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path("build/bench/libpeaks.so")
READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Peaks:
    """The best of several runs, all threads together."""

    threads: int
    fma_gflop_s: float  # fp32
    bf16_gflop_s: float | None  # vdpbf16ps; None on a CPU without
    read_gb_s: float  # from main memory

    def gflop_s(self, dtype: str) -> float:
        """The peak that bounds products of this dtype; fp16 is computed in fp32."""
        if dtype == "bf16" and self.bf16_gflop_s is not None:
            return self.bf16_gflop_s
        return self.fma_gflop_s

    def best(self, other: Peaks) -> Peaks:
        pairs = (self.bf16_gflop_s, other.bf16_gflop_s)
        return Peaks(
            self.threads,
            max(self.fma_gflop_s, other.fma_gflop_s),
            None if None in pairs else max(pairs),
            max(self.read_gb_s, other.read_gb_s),
        )


def load_library(root: Path) -> ctypes.CDLL:
    path = root / LIBRARY
    if not path.exists():
        raise FileNotFoundError(f"{LIBRARY}: not there; `make bench` builds it")
    library = ctypes.CDLL(str(path))
    both = [ctypes.c_int, ctypes.c_int]  # threads, repeats
    library.toppings_peak_fma.argtypes = both
    library.toppings_peak_bf16.argtypes = both
    library.toppings_peak_read.argtypes = [*both, ctypes.c_size_t]
    library.toppings_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for name in ("fma", "bf16", "read"):
        getattr(library, f"toppings_peak_{name}").restype = ctypes.c_double
    return library


def measure_peaks(library: ctypes.CDLL, threads: int, repeats: int) -> Peaks:
    fma = library.toppings_peak_fma(threads, repeats)
    bf16 = library.toppings_peak_bf16(threads, repeats)
    read = library.toppings_peak_read(threads, repeats, READ_BYTES)
    if math.isnan(fma) or math.isnan(read):
        raise RuntimeError(
            f"peaks: expected FMA instructions and {READ_BYTES >> 20} MiB of memory, got fma {fma}"
            f" and read {read}"
        )
    return Peaks(threads, fma, None if math.isnan(bf16) else bf16, read)
