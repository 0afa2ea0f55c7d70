# SPDX-License-Identifier: Apache-2.0
"""What cuobjdump says about the kernels inside a library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGES = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
_RESOURCES = re.compile(r"^ Function (\w+):\n\s+(REG:.*)$", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : (\w+)$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Tools:
    cuobjdump: Path
    path: str  # PATH, with nvdisasm on it

    def run(self, *arguments: str | Path) -> str:
        # "does not contain device code" is exit status 255.
        command = [self.cuobjdump, *arguments]
        done = subprocess.run(
            command, env={**os.environ, "PATH": self.path}, capture_output=True, text=True
        )
        if done.returncode != 0 and "does not contain device code" not in done.stderr:
            raise RuntimeError(f"cuobjdump {arguments}: {done.stderr or done.stdout}")
        return done.stdout


def find_tools() -> Tools | None:
    """Those of the PyPI packages, else those of a toolkit on PATH."""
    spec = find_spec("nvidia")
    places = (spec.submodule_search_locations or []) if spec is not None else []
    folders = [Path(place, "cu13/bin") for place in places]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    found = [shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")]
    return Tools(Path(found[0]), path) if found[0] and found[1] else None


def architectures(tools: Tools, library: Path) -> list[str]:
    """With machine code inside."""
    names = re.findall(r"\.(sm_\d+\w?)\.cubin", tools.run("--list-elf", library))
    return sorted(set(names))


def resources(tools: Tools, library: Path, arch: str) -> dict[str, dict[str, int]]:
    """REG, STACK, LOCAL, SHARED of every function."""
    text = tools.run("-arch", arch, "--dump-resource-usage", library)
    return {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", use)}
        for name, use in _RESOURCES.findall(text)
    }


def instructions(tools: Tools, library: Path, arch: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in every function, with its modifiers."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in tools.run("-arch", arch, "-sass", library).splitlines():
        if match := _FUNCTION.match(line):
            current = counts.setdefault(match[1], Counter())
        elif match := _INSTRUCTION.match(line):
            current[match[1]] += 1
    return counts
