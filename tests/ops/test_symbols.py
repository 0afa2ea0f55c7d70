# SPDX-License-Identifier: Apache-2.0
"""Objects compiled for a newer CPU must not offer the linker a copy of a shared inline function."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")


@pytest.mark.parametrize("level", LEVELS)
def test_one_table_and_nothing_weak(level: str) -> None:
    objects = sorted((ROOT / "build").glob(f"**/cpu/{level}.cpp.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs nm and a build folder in this checkout")
    for file in objects:
        command = ["nm", "--defined-only", "--extern-only", "--demangle", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = [line.split(maxsplit=2)[2] for line in lines.splitlines()]
        names = [name for name in names if "asan" not in name]  # a sanitizer's own
        assert len(names) == 1 and names[0].endswith("Kernels"), (file, names)
