# SPDX-License-Identifier: Apache-2.0
"""One wheel, made from the source archive as pip makes it, and one new environment, for all."""

import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="toppings-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def archive(folder: Path) -> Path:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=ROOT)
    return folder / f"toppings-{importlib.metadata.version('toppings')}.tar.gz"


@pytest.fixture(scope="session")
def wheel(folder: Path, archive: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, archive, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def python(folder: Path, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel and the dependencies that it declares."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    torch = importlib.metadata.version("torch").split("+")[0]
    run(python, "-m", "pip", "install", f"torch=={torch}", wheel)
    return python


@pytest.fixture(scope="session")
def installed(python: Path) -> Path:
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip()
    return Path(site) / "toppings"
