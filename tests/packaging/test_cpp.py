# SPDX-License-Identifier: Apache-2.0
"""What an engine builder gets: the library, from the wheel and from `cmake --install`, used by
programs that are built outside of the repository.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import CMAKE, run

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).parent / "consumer"
VERSION = importlib.metadata.version("toppings")

needs_pkg_config = pytest.mark.skipif(
    not shutil.which("pkg-config"), reason="pkg-config isn't installed"
)

# Of docs/cpp.md; torch isn't imported.
WHERE = (
    "import importlib.util as util; print(*util.find_spec('toppings').submodule_search_locations)"
)

# Every kind of layer: all projections targeted, some, none.
PACK = """
import sys, torch
from toppings import _runtime
attention = [(f"self_attn.{p}_proj", 48, n) for p, n in zip("qkv", (48, 16, 16))]
layers = [attention + [("self_attn.o_proj", 48, 48), ("mlp.down_proj", 77, 48)]] * 4
ranks = [[8, 0, 3, 5, 1], [0] * 5, [0, 0, 0, 0, 33], [4] * 5]
layout = _runtime.AdapterLayout(_runtime.ModelShape(layers), "float16", ranks)
store = _runtime.HostStore(1 << 22)
builder = store.build(layout, "packed by Python")
for l, layer in enumerate(layers):
    for p, (_, k, n) in enumerate(layer):
        if r := ranks[l][p]:
            builder.set(l, p, torch.randn(r, k) / k**0.5, torch.randn(n, r), 2 / r)
_runtime.write_image(store.insert(builder), sys.argv[1])
"""


@pytest.fixture(scope="session")
def prefix(folder: Path, archive: Path) -> Path:
    """Installed without Python and torch, then moved. Debug compiles fastest."""
    shutil.unpack_archive(archive, folder)
    build = folder / "build"
    source = folder / archive.name.removesuffix(".tar.gz")
    options = ["-DTOPPINGS_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug"]
    run(CMAKE, "-S", source, "-B", build, *options)
    run(CMAKE, "--build", build, "--parallel", str(os.cpu_count()))
    run(CMAKE, "--install", build, "--prefix", folder / "prefix")
    shutil.rmtree(build)
    return (folder / "prefix").rename(folder / "moved prefix")


@pytest.fixture(scope="session")
def library_dir(prefix: Path) -> Path:
    (library,) = prefix.rglob("libtoppings.so")
    return library.parent


def build_by_cmake(source: Path, where: Path, build: Path) -> Path:
    """As docs/cpp.md says."""
    run(CMAKE, "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={where}")
    run(CMAKE, "--build", build, "--parallel", str(os.cpu_count()))
    return build


def build_by_pkg_config(source: Path, lib: Path, program: Path) -> Path:
    environment = {**os.environ, "PKG_CONFIG_PATH": str(lib / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "toppings", env=environment)
    words = [word.replace("\\", "") for word in re.split(r"(?<!\\) ", flags.strip())]
    rpath = f"-Wl,-rpath,{lib}"
    run("g++", *sorted(source.glob("*.cpp")), "-o", program, *words, rpath)
    return program


@pytest.fixture(scope="session")
def example(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT / "examples" / "engine_cpp", folder / "engine_cpp"))


@pytest.fixture(scope="session")
def adapter(python: Path, folder: Path) -> Path:
    file = folder / "packed"
    run(python, "-c", PACK, file, cwd="/")
    return file


@pytest.fixture(
    scope="session",
    params=[
        "wheel, find_package",
        "prefix, find_package",
        pytest.param("wheel, pkg-config", marks=needs_pkg_config),
        pytest.param("prefix, pkg-config", marks=needs_pkg_config),
    ],
)
def engine(request: pytest.FixtureRequest, folder: Path, example: Path) -> Path:
    """The example, built with the library of the wheel or of the prefix."""
    origin, tool = request.param.split(", ")
    if origin == "wheel":
        where = Path(run(request.getfixturevalue("python"), "-c", WHERE, cwd="/").strip())
        lib = where / "lib"
    else:
        where = request.getfixturevalue("prefix")
        lib = request.getfixturevalue("library_dir")
    if tool == "find_package":
        return build_by_cmake(example, where, folder / request.param) / "engine_cpp"
    return build_by_pkg_config(example, lib, folder / request.param)


def test_engine(engine: Path, adapter: Path, tmp_path: Path) -> None:
    output = run(engine, adapter, "--tokens", "5", "--gb-per-s", "0.5")
    assert "host, link of 0.5 GB/s and 10 us (emulated)" in output
    assert "packed by Python, 4 layers, rank <= 33, float16" in output
    assert re.findall(r"(?m)^ +(\d+) .*\|$", output) == list("0123")
    assert "layer by layer:" in output and "load, then compute:" in output
    assert "16 layers" in run(engine, tmp_path / "own", "--generate", "--tokens", "3")


@pytest.mark.parametrize("engine", ["prefix, find_package"], indirect=True)
def test_engine_reads_what_the_command_packs(engine: Path, tmp_path: Path) -> None:
    model = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    command = Path(sys.executable).with_name("toppings")
    trained = ROOT / "examples" / "adapters" / "pirate"
    run(command, "pack", trained, "--model", tmp_path, "-o", tmp_path / "packed")
    output = run(engine, tmp_path / "packed", "--tokens", "5")
    assert "30 layers, rank <= 4, bfloat16" in output


def damaged(adapter: Path, target: Path) -> Path:
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    return target


def cut_off(adapter: Path, target: Path) -> Path:
    target.write_bytes(adapter.read_bytes()[:-64])
    return target


@pytest.mark.parametrize("engine", ["wheel, find_package"], indirect=True)
def test_engine_tells_what_is_wrong(engine: Path, adapter: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for arguments, message in [
        ([], "arguments: expected a file, got none"),
        ([adapter, "--token", "5"], "got '--token'"),
        ([adapter, "--tokens"], "--tokens: expected a number, got nothing"),
        ([adapter, "--tokens", "0"], "--tokens: expected a number from 1 to"),
        ([adapter, "--gb-per-s", "fast"], "--gb-per-s: expected a number from"),
        ([missing], str(missing)),
        ([damaged(adapter, tmp_path / "damaged")], "checksum of layer 3"),
        ([cut_off(adapter, tmp_path / "cut off")], "cut off"),
        ([tmp_path / "generated", "--generate", "--budget-mb", "1"], "budget"),
    ]:
        done = subprocess.run([engine, *arguments], capture_output=True, text=True)
        assert done.returncode == 2, (arguments, done)
        assert done.stderr.startswith("engine_cpp: ") and message in done.stderr, done.stderr


@pytest.mark.parametrize("version", ["0.0", "0.2", "1.0"])
def test_other_versions_are_refused(prefix: Path, tmp_path: Path, version: str) -> None:
    assert VERSION.startswith("0.1.")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(other LANGUAGES NONE)\n"
        f"find_package(toppings {version} REQUIRED)\n"
    )
    command = [CMAKE, "-S", tmp_path, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert f'compatible with requested version "{version}"' in message, message


def test_smallest_consumer(prefix: Path, folder: Path) -> None:
    """Also: the ABI number of headers and library, and an exception across their border."""
    consumer = build_by_cmake(CONSUMER, prefix, folder / "consumer") / "consumer"
    assert run(consumer).strip() == VERSION


def test_library(library_dir: Path, installed: Path) -> None:
    header = (installed / "include" / "toppings" / "version.h").read_text()
    (abi,) = re.findall(r"#define TOPPINGS_ABI_VERSION (\d+)", header)
    for library in (library_dir / "libtoppings.so", installed / "lib" / f"libtoppings.so.{abi}"):
        dynamic = run("readelf", "-dW", library)
        assert re.findall(r"SONAME.*\[(.*)\]", dynamic) == [f"libtoppings.so.{abi}"]
        assert not re.search(r"NEEDED.*\[lib(torch|python|c10)", dynamic), dynamic
        assert not re.search(r"R(UN)?PATH", dynamic), dynamic
        names = [line.split(maxsplit=2)[2] for line in exported(library)]
        assert "toppings::abi_version()" in names
        own = r"((typeinfo|typeinfo name|vtable) for )?toppings::"
        assert not [name for name in names if not re.match(own, name)]


def exported(library: Path) -> list[str]:
    return run("nm", "-DC", "--defined-only", library).splitlines()


def check_cpp(code: str, include: Path) -> None:
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    run("g++", *options, "-I", include, "-x", "c++", "-", input=code)


def test_guide_compiles(prefix: Path) -> None:
    (code,) = re.findall(r"(?s)```cpp\n(.*?)```", (ROOT / "docs" / "cpp.md").read_text())
    main = "int main() { serve(nullptr, *host_device()->make_stream(), [](int, auto&) {}); }\n"
    check_cpp(code + main, prefix / "include")


def test_every_header_stands_alone(prefix: Path) -> None:
    include = prefix / "include"
    headers = sorted(path.relative_to(include) for path in include.rglob("*.h"))
    assert len(headers) > len(list(ROOT.glob("include/toppings/*.h")))  # export.h

    def check(header: Path) -> None:
        check_cpp(f"#include <{header}>\n", include)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, headers))
