# SPDX-License-Identifier: Apache-2.0
"""Builds libtoppings and the Python modules by native_build.py; the rest is in pyproject.toml.

An editable install builds in build/cmake, a wheel in build/wheel.  Both are kept, so that a rebuild
compiles what changed.  The CMake cache of build/cmake is the developer's, a wheel never sees it:
`cmake -DTOPPINGS_CUDA_ARCHS=90-real build/cmake` holds until the folder is removed, and so does
`python setup.py build_ext --inplace --cuda-archs=90-real`.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build doesn't look here
import native_build  # noqa: E402


class CMakeBuild(build_ext):
    user_options = [
        *build_ext.user_options,
        ("cuda-archs=", None, "CUDA architectures, as CMake names them"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cuda_archs = None

    def run(self) -> None:
        in_place = bool(self.inplace)
        packages = ROOT / "python" if in_place else Path(self.build_lib)
        native_build.build(
            ROOT / "build" / ("cmake" if in_place else "wheel"),
            packages / "toppings",
            strict=in_place,
            strip=not in_place,
            cuda_archs=self.cuda_archs,
        )


class CleanBuild(build):
    def run(self) -> None:
        # A module that is gone from the source must not stay in the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Metadata(dist_info):
    def run(self) -> None:
        native_build.torch_dir()  # fail here, before pip starts to download one
        super().run()


setup(
    ext_modules=[Extension("toppings._runtime", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "dist_info": Metadata},
)
