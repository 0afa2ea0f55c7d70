# SPDX-License-Identifier: Apache-2.0
"""The command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toppings import cli
from toppings.calibration import CpuCalibration
from toppings.cli import main

ADAPTERS = Path(__file__).resolve().parents[1] / "examples" / "adapters"


def test_inspect_tells_what_a_folder_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ADAPTERS / "butler")]) == 0
    printed = capsys.readouterr().out
    for word in ("down_proj", "q_proj", "16", "bfloat16"):
        assert word in printed


def test_what_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "adapter_config.json" in captured.err


def test_too_little_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(cli, "read_adapter", greedy)
    assert main(["inspect", str(ADAPTERS / "butler")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "memory" in captured.err


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-m", "toppings.cli", "inspect", str(ADAPTERS / "butler")]
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (1, b"")


SMALL = "calibrate --cpu --quick --widths 64 128 --ranks 4 8 --tokens 1 4"


def test_calibrate_measures_prints_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    assert main([*SMALL.split(), "--output", str(path), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    for word in ("tokens/s per core", "float32", "T=4", f"saved to {path}"):
        assert word in printed
    result = CpuCalibration.load(path)
    assert result.dtype == "float32" and len(result.points) == 8

    assert main([*SMALL.split(), "--output", str(path)]) == 0
    assert f"replaced {path}" in capsys.readouterr().out
    assert CpuCalibration.load(path).dtype == "bfloat16"


def test_calibrate_replaces_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    path.write_text("notes")
    assert main([*SMALL.split(), "--output", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(path) in captured.err
    assert path.read_text() == "notes"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("calibrate", "expected --cpu"),
        ("calibrate --cpu --ranks 0", "ranks: expected a positive integer, got 0"),
        ("calibrate --cpu --tokens 4 4", "each once"),
        ("calibrate --cpu --output no/folder/cpu.json", "no/folder/cpu.json"),
    ],
)
def test_calibrate_refuses_in_one_line(
    arguments: str,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and word in captured.err
    assert not list(tmp_path.iterdir())
