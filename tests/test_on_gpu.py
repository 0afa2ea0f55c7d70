# SPDX-License-Identifier: Apache-2.0
"""make gpu on a machine without a GPU: what it says, and that no phase holds up another."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import on_gpu
import pytest
import torch
from on_gpu import Phase, environment, is_older, make_phases, run_phase

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
    assert "missing: pybind11: pip install 'pybind11>=3.0'" in lines
    assert "missing: nvcc: neither on PATH nor in /usr/local/cuda/bin" in lines
    assert "absent: matplotlib, for the figure" in lines
    assert not any("\n" in line for line in lines)


def test_what_is_too_old_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'tools, release 12.6, V12.6.85'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(on_gpu, "version", lambda name: {"pybind11": "2.13.6"}.get(name, "99.0"))
    monkeypatch.setattr(on_gpu.sysconfig, "get_path", lambda name: str(tmp_path))
    lines = environment(sys.executable)
    assert "too old: pybind11 2.13.6: pip install 'pybind11>=3.0'" in lines
    assert f"too old: nvcc 12.6: 12.8 is needed ({nvcc})" in lines
    assert any(line.startswith(f"missing: Python.h: not in {tmp_path}; ") for line in lines)
    monkeypatch.setattr(on_gpu, "ask_torch", lambda python: ("a card", "90", "2.11"))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path / "out")])
    assert on_gpu.main() == 1
    assert not (tmp_path / "out").exists()


def test_versions_are_compared_as_numbers():
    assert is_older("2.9.1+cu130", "2.11") and is_older("1.26", "3.0")
    assert not is_older("2.11.0+cu130", "2.11") and not is_older("10.0.dev1", "9.5")
    assert not is_older("unknown", "1.0")


def test_nvcc_beside_path_is_found_and_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_gpu, "CUDA_FOLDER", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    build, _, sanitizer, *_ = make_phases(sys.executable, tmp_path, "90", rehearse=False, commit="")
    assert build.commands[0][-2:] == ("--nvcc", str(tmp_path / "nvcc"))
    assert sanitizer.commands[0][0] == str(tmp_path / "compute-sanitizer")
    monkeypatch.setenv("PATH", str(tmp_path))
    (build, *_) = make_phases(sys.executable, tmp_path, "90", rehearse=False, commit="")
    assert "--nvcc" not in build.commands[0]


def test_the_sanitizer_checks_only_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_gpu, "find_tool", lambda *_: "/compute-sanitizer")
    memcheck, racecheck = on_gpu.sanitizer_commands(sys.executable, rehearse=False)
    for command in (memcheck, racecheck):
        line = " ".join(command)
        assert "--report-api-errors no --kernel-name kernel_substring=toppings" in line
        assert f"{sys.executable} -m ops.sanitized" in line
    assert racecheck[-1] == "few" and memcheck[-1] != "few"


def test_python_path_is_kept_behind_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/theirs")
    (tmp_path / "theirs/tests/ops").mkdir(parents=True)
    for folder in ("theirs/tests", "theirs/tests/ops"):  # regular packages, which win over ours
        (tmp_path / folder / "__init__.py").touch()
    code = "import os, ops.lora_case as case; print(os.environ['PYTHONPATH'], case.__file__)"
    assert on_gpu.run(python(code), 60, tmp_path / "log") == "passed"
    output = (tmp_path / "log").read_text().splitlines()[-1]
    paths = [str(ROOT / "python"), str(ROOT / "tests"), f"{tmp_path}/theirs"]
    assert output == f"{os.pathsep.join(paths)} {ROOT / 'tests/ops/lora_case.py'}"


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
    short = perf_counter() + on_gpu.LEAST_S + on_gpu.BUDGET_REST_S - 1
    assert not run_phase(told, tmp_path, short)
    assert not (tmp_path / "told.log").exists()
    assert run_phase(replace(told, budget_option=None), tmp_path, short)


def test_at_most_eight_files_are_written(tmp_path: Path):
    phases = make_phases(sys.executable, tmp_path, "90", rehearse=True, commit="abc")
    files = {phase.log for phase in phases} | {"loader.json", "ops.json", "ops.png"}
    assert len(files) <= 8
    assert "--cuda-archs=90-real" in phases[0].commands[0]
