# SPDX-License-Identifier: Apache-2.0
import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from toppings import _runtime

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def test_building_needs_no_torch() -> None:
    assert "torch" not in names(PYPROJECT["build-system"]["requires"])


def test_one_version() -> None:
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("toppings") == version
    assert _runtime.version() == version


def test_every_file_names_its_licence() -> None:
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cuh", ".cu", ".cmake", ".in"}
    generated = {ROOT / "python" / "toppings" / name for name in ("include", "lib")}
    for folder in ("include", "csrc", "python", "tests", "bench", "examples", "third_party"):
        for file in (ROOT / folder).rglob("*"):
            if generated.isdisjoint(file.parents) and (
                file.suffix in suffixes or file.name == "CMakeLists.txt"
            ):
                with file.open() as text:
                    assert "SPDX-License-Identifier: Apache-2.0" in text.readline(), file


def test_imports_are_declared() -> None:
    project = PYPROJECT["project"]
    declared = names(project["dependencies"] + project["optional-dependencies"]["engine"])
    for file in (ROOT / "python" / "toppings").rglob("*.py"):
        used = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used.add(node.module.split(".")[0])
        missing = used - declared - sys.stdlib_module_names - {"toppings"}
        assert not missing, f"{file}: not in pyproject.toml: {missing}"
