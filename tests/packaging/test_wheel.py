# SPDX-License-Identifier: Apache-2.0
"""What a user gets: a wheel, made from the source archive as pip makes it, in a new environment."""

import importlib.metadata
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from commands import run

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
VERSION = importlib.metadata.version("toppings")
# The newest OpenMP that every torch's own libgomp offers: the process has only that one.
MAX_OPENMP = (4, 5)

OPERATOR = """
import torch, toppings
x, y = torch.randn(2, 8), torch.zeros(2, 4)
a, b = torch.randn(3, 8), torch.randn(3, 4)
arena = torch.cat([a.flatten(), b.flatten()])
slots, scales = torch.tensor([[[0, a.numel(), 3]]]), torch.tensor([[0.5]])
token_slots = torch.tensor([0, -1], dtype=torch.int32)
out = torch.ops.toppings.lora_forward(y, x, arena, arena, slots, scales, token_slots, [4])
torch.testing.assert_close(out, torch.stack([0.5 * x[0] @ a.T @ b, y[1]]))
print(toppings.__file__)
"""


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    headers = {f"toppings/include/toppings/{p.name}" for p in ROOT.glob("include/toppings/*.h")}
    modules = {
        str(p.relative_to(ROOT / "python"))
        for p in (ROOT / "python" / "toppings").rglob("*")
        if p.suffix in {".py", ".pyi", ".typed"}
    }
    others = {
        "toppings/_ops.so",
        "toppings/include/toppings/export.h",
        "toppings/lib/libtoppings.so",
        "toppings/lib/libtoppings.so.1",
        "toppings/lib/pkgconfig/toppings.pc",
        "toppings/lib/cmake/toppings/toppings-config.cmake",
        f"toppings-{VERSION}.dist-info/licenses/LICENSE",
    }
    missing = (headers | modules | others) - names
    assert not missing, sorted(missing)
    assert all(re.match(r"toppings(-[^/]*\.dist-info)?/", name) for name in names), sorted(names)


def test_operator(python: Path, installed: Path) -> None:
    file = run(python, "-c", OPERATOR, cwd="/").strip()
    assert Path(file).parent == installed


def test_command(python: Path) -> None:
    run(python.with_name("toppings"), "--help", cwd="/")


def test_operators_use_the_stable_abi(installed: Path) -> None:
    audit = Path(sys.executable).with_name("torch-abi-audit")
    (library,) = json.loads(run(audit, "--json", installed / "_ops.so"))["bundled_libs"]
    torch = library["torch"]
    assert torch["stable"] and not torch["unstable_symbols"], torch
    assert not torch["unknown_shim_symbols"], torch
    assert tuple(map(int, torch["min_torch_version"].split(".")[:2])) <= (2, 11), torch


def test_libraries_need_only_what_they_should(installed: Path) -> None:
    core = installed / "lib" / "libtoppings.so.1"
    (runtime,) = installed.glob("_runtime.*.so")
    for library in (core, runtime, installed / "_ops.so"):
        dynamic = run("readelf", "-dW", library)
        needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
        allowed = {"libc", "libm", "libgcc_s", "libstdc++", "libgomp", "ld-linux-x86-64"}
        allowed |= {"libdl", "libpthread", "librt"}  # of a glibc before 2.34
        if library != core:
            allowed.add("libtoppings")
            assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic) == ["$ORIGIN/lib"], dynamic
        if library.name == "_ops.so":
            allowed |= {"libtorch_cpu", "libtorch"}
        assert needed <= allowed, f"{library}: {needed - allowed}"
        symbols = run("readelf", "-VW", library)
        openmp = re.findall(r"Name: G?OMP_(\d+)\.(\d+)", symbols)
        assert all((int(a), int(b)) <= MAX_OPENMP for a, b in openmp), f"{library}: {openmp}"
    # One binary for every Python.
    assert " Py" not in run("nm", "-D", "--undefined-only", installed / "_ops.so")
