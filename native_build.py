# SPDX-License-Identifier: Apache-2.0
"""Builds libtoppings and the Python modules with CMake and Ninja. setup.py uses it; it needs no
setuptools, so it also builds in place where that is absent or too old for pyproject.toml.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)


def torch_dir() -> Path:
    """The torch package to build against: only its headers and libraries are needed.

    It is found as a folder, because an isolated build environment hides it from import.
    """
    spec = find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(scheme), "torch") for scheme in ("purelib", "platlib")]
    for folder in folders:
        version = folder / "version.py"
        if not version.is_file():
            continue
        match = re.search(r"__version__ = '(\d+)\.(\d+)[^']*'", version.read_text())
        if match and (int(match[1]), int(match[2])) >= MIN_TORCH:
            return folder
        raise SystemExit(f"torch: expected >= 2.11, got {match and match[0]} ({folder})")
    raise SystemExit(
        f"torch: expected >= 2.11 installed for {sys.executable}, got none.\n"
        "toppings is built against an installed torch and never fetches one; install it first, "
        "for example: pip install torch==2.13.0"
    )


def find_tool(name: str) -> str:
    """The build tool beside this Python, else the one on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SystemExit(f"{name}: not found; pip install {name}")
    return tool


def run(*command: str | Path, quiet: bool = False) -> None:
    stdout = subprocess.DEVNULL if quiet else None
    code = subprocess.call([str(word) for word in command], stdout=stdout)
    if code != 0:
        raise SystemExit(f"error: exit status {code}: {' '.join(map(str, command))}")


def configure(
    cmake: str, folder: Path, strict: bool, cuda_archs: str | None, nvcc: str | None
) -> None:
    """Runs CMake when the build folder isn't there yet, or when one of the arguments changed."""
    import pybind11

    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SystemExit("Python.h: not found; on Debian: apt-get install python3-dev")
    own = {"CMAKE_HOME_DIRECTORY": ROOT, "Python_EXECUTABLE": Path(sys.executable)}
    cache = folder / "CMakeCache.txt"
    if cache.is_file():
        kept = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
        if any(kept.get(key) != str(value) for key, value in own.items()):
            shutil.rmtree(folder)  # of another source tree or another Python
    # The make program again and again: an isolated build's ninja is gone when the build is over.
    command = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"] + [
        f"-D{key}={value}"
        for key, value in {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_INSTALL_LIBDIR": "lib",
            "CMAKE_COMPILE_WARNING_AS_ERROR": "ON" if strict else "OFF",
            "TOPPINGS_PYTHON": "ON",
            "TOPPINGS_TORCH_DIR": torch_dir(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }.items()
    ]
    if cuda_archs is not None:
        command.append(f"-DTOPPINGS_CUDA_ARCHS={cuda_archs}")
    if nvcc is not None:
        command.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    line = "\n".join(map(str, command))
    done = folder / "configured-with.txt"
    if done.is_file() and done.read_text() == line:
        return
    run(*command)
    done.write_text(line)


def publish(source: Path, target: Path) -> None:
    """Makes each file under `source` appear whole in `target`: the old one may be in use."""
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        if file.is_dir() or (copy.is_file() and filecmp.cmp(file, copy, shallow=False)):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        new = copy.with_name(f".{copy.name}.{os.getpid()}")
        shutil.copy2(file, new)
        os.replace(new, copy)


def build(
    folder: Path,
    package: Path,
    strict: bool = False,
    strip: bool = False,
    cuda_archs: str | None = None,
    nvcc: str | None = None,
) -> None:
    """Compiles in `folder`, then puts libraries, modules and headers into `package`."""
    cmake = find_tool("cmake")
    configure(cmake, folder, strict, cuda_archs, nvcc)
    run(cmake, "--build", folder, "--target", "toppings", "toppings_ops", "toppings_runtime")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for component in ("library", "python"):
            install = (cmake, "--install", folder, "--prefix", made, "--component", component)
            run(*install, *(["--strip"] if strip else []), quiet=True)
        # What -ltoppings finds. Wheels carry no links, so it is a linker script.
        lib = Path(made, "lib")
        (soname,) = (file.name for file in lib.glob("libtoppings.so.*"))
        (lib / "libtoppings.so").write_text(f"INPUT({soname})\n")
        publish(Path(made), package)


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds in place: build/cmake, python/toppings.")
    parser.add_argument("--cuda-archs", help="CUDA architectures, as CMake names them")
    parser.add_argument("--nvcc", help="where it isn't on PATH")
    parser.add_argument("--allow-warnings", action="store_true", help="for compilers not tried")
    args = parser.parse_args()
    build(
        ROOT / "build" / "cmake",
        ROOT / "python" / "toppings",
        strict=not args.allow_warnings,
        cuda_archs=args.cuda_archs,
        nvcc=args.nvcc,
    )


if __name__ == "__main__":
    main()
