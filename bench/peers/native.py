# SPDX-License-Identifier: Apache-2.0
"""oneDNN and libxsmm, called from C++ (native.h) on sorted tokens, weights packed beforehand."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

from cases import Case
from inputs import Inputs

from peers.interface import Absent, Run
from peers.torch_variants import make_parts

FOLDER = Path("build/bench")
_LIBRARIES = {"oneDNN": "libpeer_onednn.so", "libxsmm": "libpeer_xsmm.so"}


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "rank")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "a", "b")),
        ("scale", ctypes.c_double),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("bf16", "width_in", "width_out", "calls", "parts")
    ]


def find_native_peers(root: Path) -> list[NativePeer | Absent]:
    paths = {name: root / FOLDER / file for name, file in _LIBRARIES.items()}
    return [
        NativePeer(name, path) if path.exists() else Absent(name, "run `make bench-peers`")
        for name, path in paths.items()
    ]


class NativePeer:
    sorted = True

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._library = ctypes.CDLL(str(path))
        self._library.toppings_peer_version.restype = ctypes.c_char_p
        self._library.toppings_peer_error.restype = ctypes.c_char_p
        self._library.toppings_peer_prepare.restype = ctypes.c_void_p
        self._library.toppings_peer_run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._library.toppings_peer_free.argtypes = [ctypes.c_void_p]
        self.version = self._library.toppings_peer_version().decode()

    def supports(self, case: Case) -> bool:
        return case.dtype != "fp16"

    def prepare(self, inputs: Inputs) -> Run:
        calls = [make_parts(inputs, call) for call in range(inputs.sets)]
        parts = [
            _Part(len(x), len(a), x.data_ptr(), y.data_ptr(), a.data_ptr(), b.data_ptr(), scale)
            for call in calls
            for x, y, a, b, scale in call
        ]
        case = inputs.case
        problem = _Problem(
            bf16=case.dtype == "bf16",
            width_in=case.width_in,
            width_out=case.width_out,
            calls=len(calls),
            parts=len(calls[0]),
        )
        prepared = self._library.toppings_peer_prepare(
            ctypes.byref(problem), (_Part * len(parts))(*parts)
        )
        if prepared is None:
            error = self._library.toppings_peer_error().decode()
            raise RuntimeError(f"{self.name}: {error} ({case})")
        run = self._library.toppings_peer_run

        def run_call(call: int) -> None:
            run(prepared, call)

        weakref.finalize(run_call, self._library.toppings_peer_free, prepared)
        return run_call
