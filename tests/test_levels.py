# SPDX-License-Identifier: Apache-2.0
"""The architecture, as data: a file may include or import its own level or a lower one.

A new file needs a place in these tables. If it doesn't fit anywhere, think about the file first.
"""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "toppings"

# Lowest first. A C++ module is a header with its .cpp, named by its path without the root folder.
CPP_LEVELS = [
    (
        "basics",
        "export version error check dtype device cpu/convert image/transpose image/crc32c"
        " image/file host/* cuda/device cuda/device_*",
    ),
    ("block and adapter", "model_shape adapter_layout range_allocator store/* image image/*"),
    ("host store", "host_store image_file image_reader"),
    ("arena and slots", "arena slots/* slot_table"),
    ("loader", "load load/* loader"),
    (
        "plan and kernels",
        "cpu_level lora_args lora_plan stages lora_serial lora lora_cuda cpu/* cuda/*",
    ),
    ("assist", "assist/*"),
    ("bindings", "torch/* python/*"),
]
PYTHON_LEVELS = [
    ("errors and binaries", "toppings.errors toppings._runtime toppings._ops"),
    ("adapter files and library", "toppings.adapter toppings.adapter.* toppings.library"),
    ("operators", "toppings.ops toppings.reference toppings.cpu"),
    ("layers", "toppings.layers toppings.attachment"),
    ("costs", "toppings.calibration toppings.calibration.*"),
    ("engine", "toppings.engine toppings.engine.*"),
    ("public names", "toppings"),
    ("command line", "toppings.cli toppings.cli_* toppings.__main__"),
]
# An include of one of these may stand only in that folder.
FENCES = {
    r"(torch|ATen|c10)/": "csrc/torch",
    r"pybind11/|Python\.h": "csrc/python",
    r"cuda|cooperative_groups|cub/|mma\.h": "csrc/cuda",
}


def level_of(module: str, levels: list[tuple[str, str]]) -> int | None:
    for number, (_, patterns) in enumerate(levels):
        if any(fnmatchcase(module, pattern) for pattern in patterns.split()):
            return number
    return None


def cpp_files() -> Iterator[Path]:
    for folder in ("include/toppings", "csrc"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in {".h", ".cpp", ".cuh", ".cu"}:
                yield file.relative_to(ROOT)


def includes(file: Path) -> list[str]:
    return re.findall(r'(?m)^\s*#\s*include\s*[<"]([^>"]+)[>"]', (ROOT / file).read_text())


def cpp_module(path: str) -> str:
    return re.sub(r"^(include/)?toppings/|^csrc/", "", path).rsplit(".", 1)[0]


def cpp_graph() -> dict[str, set[str]]:
    """module -> the project's modules it includes."""
    graph: dict[str, set[str]] = {}
    for file in cpp_files():
        uses = graph.setdefault(cpp_module(str(file)), set())
        for name in includes(file):
            beside = file.parent / name
            own = name.startswith("toppings/") or (ROOT / "csrc" / name).is_file()
            if own or (ROOT / beside).is_file():
                uses.add(cpp_module(name if own else str(beside)))
        uses.discard(cpp_module(str(file)))
    return graph


def python_graph() -> dict[str, set[str]]:
    """module -> the package's modules it imports, in functions and under TYPE_CHECKING too."""
    modules = {}
    for file in sorted(PACKAGE.rglob("*.py*")):
        if file.suffix in {".py", ".pyi"}:
            parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        package = module if file.stem == "__init__" else module.rpartition(".")[0]
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
                inner = {f"{base}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else base for name in inner}
        graph[module] = {name for name in names if re.match(r"toppings(\.|$)", name)} - {module}
    return graph


GRAPHS = {"C++": (cpp_graph, CPP_LEVELS), "Python": (python_graph, PYTHON_LEVELS)}


@pytest.mark.parametrize("language", GRAPHS)
def test_arrows_point_down(language: str) -> None:
    make_graph, levels = GRAPHS[language]
    wrong = []
    for module, uses in make_graph().items():
        level = level_of(module, levels)
        if level is None:
            wrong.append(f"{module} has no level: give it one in tests/test_levels.py")
            continue
        for used in sorted(uses):
            other = level_of(used, levels)
            if other is None or other > level:
                name = "no level" if other is None else f"'{levels[other][0]}'"
                wrong.append(f"{module} ('{levels[level][0]}') uses {used} ({name})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("language", GRAPHS)
def test_no_cycles(language: str) -> None:
    try:
        TopologicalSorter(GRAPHS[language][0]()).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_dependencies_stay_behind_their_fence() -> None:
    wrong = [
        f"{file} includes {name}: only {folder} may"
        for file in cpp_files()
        for name in includes(file)
        for pattern, folder in FENCES.items()
        if re.match(pattern, name) and not file.is_relative_to(folder)
    ]
    assert not wrong, "\n".join(wrong)
