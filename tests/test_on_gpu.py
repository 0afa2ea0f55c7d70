# SPDX-License-Identifier: Apache-2.0
"""make gpu on a machine without a GPU: what it says, and that no phase holds up another."""

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import on_gpu
import pytest
import torch
from on_gpu import Phase, environment, make_phases, run_phase

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_last_line_says_so(tmp_path: Path):
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"]
    # `make test` runs this: what it tells its own children is not for this make.
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "no GPU: torch sees none"
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda *_, **__: None)
    lines = environment(sys.executable)
    assert "missing: pybind11: pip install pybind11" in lines
    assert "missing: nvcc: not on PATH" in lines
    assert "absent: matplotlib, for the figure" in lines
    assert not any("\n" in line for line in lines)


def test_a_phase_that_fails_or_takes_too_long_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_gpu, "LEAST_S", 0)
    end = perf_counter() + 60
    wrong = python("print('why'); raise SystemExit(3)")
    assert not run_phase(Phase("wrong", (wrong, python("")), 20, "wrong.log"), tmp_path, end)
    slow = Phase("slow", (python("while True: pass"),), 0.5, "slow.log")
    assert not run_phase(slow, tmp_path, end)
    assert run_phase(Phase("right", (python(""),), 20, "right.log"), tmp_path, end)
    output = capsys.readouterr().out
    assert "wrong: FAILED, exit status 3" in output and "wrong: passed" in output
    assert "slow: stopped after 0 s" in output
    assert "    why" in output and "right: passed" in output


def test_time_is_shared_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    late = perf_counter() + 1
    phase = Phase("last", (python(""),), 20, "last.log", optional=True)
    assert run_phase(phase, tmp_path, late)
    assert "last: no time left" in capsys.readouterr().out
    told = Phase("told", (python("import sys; print(sys.argv)"),), 65, "told.log", "--seconds")
    assert run_phase(told, tmp_path, perf_counter() + 100)
    assert f"'--seconds', '{65 - on_gpu.BUDGET_REST_S}'" in (tmp_path / "told.log").read_text()


def test_at_most_eight_files_are_written(tmp_path: Path):
    phases = make_phases(sys.executable, tmp_path, "90", rehearse=True, commit="abc")
    files = {phase.log for phase in phases} | {"tests.xml", "ops.json", "ops.png"}
    assert len(files) <= 8
    assert "--cuda-archs=90-real" in phases[0].commands[0]
