# SPDX-License-Identifier: Apache-2.0
"""Builds libtoppings and the Python modules with CMake and Ninja; the rest is in pyproject.toml.

An editable install builds in build/cmake, a wheel in build/wheel.  Both are kept, so that a rebuild
compiles what changed.  The CMake cache of build/cmake is the developer's, a wheel never sees it:
`cmake -DTOPPINGS_CUDA_ARCHS=90-real build/cmake` holds until the folder is removed, and so does
`python setup.py build_ext --inplace --cuda-archs=90-real`.
"""

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

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.errors import ExecError

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
        raise ExecError(f"exit status {code}: {' '.join(map(str, command))}")


def configure(cmake: str, folder: Path, strict: bool, cuda_archs: str | None) -> None:
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


class CMakeBuild(build_ext):
    user_options = [
        *build_ext.user_options,
        ("cuda-archs=", None, "CUDA architectures, as CMake names them"),
        ("allow-warnings", None, "no warning is an error, in place too: for compilers not tried"),
    ]
    boolean_options = [*build_ext.boolean_options, "allow-warnings"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cuda_archs = None
        self.allow_warnings = False

    def run(self) -> None:
        cmake = find_tool("cmake")
        build = ROOT / "build" / ("cmake" if self.inplace else "wheel")
        strict = bool(self.inplace) and not self.allow_warnings
        configure(cmake, build, strict, self.cuda_archs)
        run(cmake, "--build", build, "--target", "toppings", "toppings_ops", "toppings_runtime")
        packages = ROOT / "python" if self.inplace else Path(self.build_lib)
        with tempfile.TemporaryDirectory(dir=build) as folder:
            for component in ("library", "python"):
                install = (cmake, "--install", build, "--prefix", folder, "--component", component)
                run(*install, *([] if self.inplace else ["--strip"]), quiet=True)
            # What -ltoppings finds. Wheels carry no links, so it is a linker script.
            lib = Path(folder, "lib")
            (soname,) = (file.name for file in lib.glob("libtoppings.so.*"))
            (lib / "libtoppings.so").write_text(f"INPUT({soname})\n")
            publish(Path(folder), packages / "toppings")


class CleanBuild(build):
    def run(self) -> None:
        # A module that is gone from the source must not stay in the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Metadata(dist_info):
    def run(self) -> None:
        torch_dir()  # fail here, before pip starts to download one
        super().run()


setup(
    ext_modules=[Extension("toppings._runtime", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "dist_info": Metadata},
)
