# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels, read back from the library: a GPU is needed for none of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from disassembly import PACKAGES, Tools, architectures, find_tools, instructions, resources

import toppings

FOLDER = Path(toppings.__file__).parent / "lib"
# Of each architecture: three number formats × two tile sizes, and the plan.
TENSOR_CORES = {"4bf16": ".BF16", "3f16": ""}
TILES = ("NarrowTile", "WideTile")
WIDE_LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128")


@pytest.fixture(scope="module")
def tools() -> Tools:
    found = find_tools()
    if found is None:
        pytest.skip(f"cuobjdump and nvdisasm aren't there: pip install {PACKAGES}")
    return found


@pytest.fixture(scope="module")
def library(tools: Tools) -> Path:
    (path,) = FOLDER.glob("libtoppings.so.*")
    if not architectures(tools, path):
        pytest.skip("libtoppings holds no CUDA kernels: nvcc was absent when it was built")
    return path


@pytest.fixture(scope="module")
def code(tools: Tools, library: Path) -> dict[tuple[str, str], Counter[str]]:
    """Instructions by architecture and function."""
    return {
        (arch, function): counts
        for arch in architectures(tools, library)
        for function, counts in instructions(tools, library, arch).items()
    }


def count(counts: Counter[str], prefix: str) -> int:
    return sum(number for name, number in counts.items() if name.startswith(prefix))


def main_kernels(code: dict[tuple[str, str], Counter[str]]) -> dict[tuple[str, str], Counter[str]]:
    return {key: counts for key, counts in code.items() if any(tile in key[1] for tile in TILES)}


def test_every_architecture_holds_the_same_kernels(code: dict) -> None:
    by_arch: dict[str, set[str]] = {}
    for arch, function in code:
        by_arch.setdefault(arch, set()).add(function)
    first = next(iter(by_arch.values()))
    assert all(functions == first for functions in by_arch.values()), by_arch
    for tile in TILES:
        formats = [function for function in first if tile in function]
        assert len(formats) == 3, formats


def test_no_local_memory(tools: Tools, library: Path) -> None:
    for arch in architectures(tools, library):
        used = resources(tools, library, arch)
        assert used, arch
        for function, numbers in used.items():
            where = (arch, function, numbers)
            assert numbers["STACK"] == 0 and numbers["LOCAL"] == 0, where


def test_no_spills(code: dict) -> None:
    for key, counts in code.items():
        spills = {name: n for name, n in counts.items() if name.startswith(("LDL", "STL"))}
        assert not spills, (key, spills)


def test_tensor_cores_are_used(code: dict) -> None:
    kernels = main_kernels(code)
    seen = 0
    for (arch, function), counts in kernels.items():
        for number, suffix in TENSOR_CORES.items():
            if f"INS0_{number}E" in function:
                assert counts[f"HMMA.16816.F32{suffix}"] > 0, (arch, function, counts)
                seen += 1
    archs = {arch for arch, _ in kernels}
    assert seen == len(archs) * len(TILES) * len(TENSOR_CORES)


def test_memory_is_read_16_bytes_at_a_time(code: dict) -> None:
    kernels = main_kernels(code)
    assert kernels
    for key, counts in kernels.items():
        for load in WIDE_LOADS:
            assert count(counts, load) > 0, (key, load, counts)


def test_every_kernel_waits_for_the_one_before(code: dict) -> None:
    """griddepcontrol.wait: a call may begin while what it reads is still being written."""
    newer = {
        (arch, function): counts
        for (arch, function), counts in code.items()
        if int(arch.removeprefix("sm_").rstrip("af")) >= 90
    }
    for key, counts in newer.items():
        assert counts["ACQBULK"] > 0, (key, counts)
