# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, on a machine that has one: `make gpu`.

It takes the Python that runs it and what is installed there, and no network. A phase that fails or
outlasts its limit doesn't keep the others from running; the exit status says whether all passed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
# What is needed, with the oldest version that will do, and what only something is needed for.
NEEDED = {
    "torch": "2.11",
    "numpy": "1.26",
    "safetensors": "0.5",
    "pybind11": "3.0",
    "pytest": "7.0",
}
TOOLS = {"cmake": "3.24", "ninja": "1.10", "nvcc": "12.8"}
CUDA_FOLDER = "/usr/local/cuda/bin"  # where nvcc and compute-sanitizer often lie beside PATH
USEFUL = {
    "hypothesis": "tests/ops/test_plan.py",
    "transformers": "tests of the engine",
    "peft": "none of these phases",
    "rich": "bench/ on the CPU",
    "triton": "vLLM's and SGLang's operators",
    "matplotlib": "the figure",
}
TOTAL_S = 570  # of all phases
BUDGET_REST_S = 45  # of a planned phase: to start, and to finish what it has begun
LEAST_S = 20  # a phase that has less left, beside that, isn't begun
ASK_TORCH = """
import torch
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(card.name, f"{card.major}{card.minor}", torch.__version__, sep="|")
"""


@dataclass(frozen=True)
class Phase:
    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: float  # of each command
    log: str
    budget_option: str | None = None  # takes the seconds that it may plan with
    optional: bool = False  # left out where no time is left


def find_tool(name: str, python: str) -> str | None:
    """Beside this Python, on PATH, or where CUDA is installed without being on it."""
    folders = [str(Path(python).parent), os.environ.get("PATH", ""), CUDA_FOLDER]
    return shutil.which(name, path=os.pathsep.join(folders))


def is_older(found: str, least: str) -> bool:
    """By the first two numbers; without two there is nothing to compare."""
    numbers = re.search(r"(\d+)\.(\d+)", found)
    return numbers is not None and [*map(int, numbers.groups())] < [*map(int, least.split("."))]


def problem_with_module(name: str, least: str) -> str | None:
    if find_spec(name) is None:
        return f"missing: {name}: pip install '{name}>={least}'"
    try:
        found = version(name)
    except PackageNotFoundError:  # on PYTHONPATH, say
        return None
    if is_older(found, least):
        return f"too old: {name} {found}: pip install '{name}>={least}'"
    return None


def problem_with_tool(name: str, least: str, python: str) -> str | None:
    tool = find_tool(name, python)
    if tool is None:
        return f"missing: {name}: neither on PATH nor in {CUDA_FOLDER}"
    output = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\d+\.\d+", output)  # the first one is it, in all of them
    if found and is_older(found[0], least):
        return f"too old: {name} {found[0]}: {least} is needed ({tool})"
    return None


def environment(python: str) -> list[str]:
    """A line for everything that is missing or too old, then one for what would be useful."""
    problems = [problem_with_module(name, least) for name, least in NEEDED.items()]
    problems += [problem_with_tool(name, least, python) for name, least in TOOLS.items()]
    lines = [problem for problem in problems if problem is not None]
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        lines.append(f"missing: Python.h: not in {headers}; on Debian: apt-get install python3-dev")
    lines += [f"absent: {name}, for {use}" for name, use in USEFUL.items() if not find_spec(name)]
    return lines


def ask_torch(python: str) -> tuple[str, str, str] | None:
    """The GPU's name, its architecture, torch's version; None without a GPU or without torch."""
    done = subprocess.run([python, "-c", ASK_TORCH], capture_output=True, text=True)
    fields = done.stdout.strip().split("|")
    return (fields[0], fields[1], fields[2]) if len(fields) == 3 else None


def make_phases(python: str, out: Path, arch: str, rehearse: bool, commit: str) -> list[Phase]:
    build = (python, "native_build.py", "--allow-warnings", f"--cuda-archs={arch}-real")
    nvcc = find_tool("nvcc", python)
    if nvcc is not None and shutil.which("nvcc") is None:  # CMake looks on PATH alone
        build += ("--nvcc", nvcc)
    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider")
    device_tests = [f"tests/{folder}/test_cuda*" for folder in ("ops", "runtime")]
    if find_spec("transformers") is not None:
        device_tests.append("tests/engine/test_cuda*")
    device_tests = tuple(
        str(path.relative_to(ROOT)) for tests in device_tests for path in sorted(ROOT.glob(tests))
    )
    loader_tests = ("tests/runtime/test_loader.py",)  # on a GPU too, where there is one
    overhead = ("make", "-s", "build/bench/liboverhead.so")
    bench = (python, "bench/ops.py", "--device", "cuda", "--out", str(out))
    loader_bench = (python, "bench/loader.py", "--out", str(out))
    loader_bench += ("--tiny",) if rehearse else ("--device", "cuda")
    loader_bench += ("--commit", commit) if commit else ()
    rest = ("--rehearse",) if rehearse else ()
    rest += ("--commit", commit) if commit else ()
    return [
        Phase("build", (build, overhead), 240, "build.log"),
        Phase("tests", ((*pytest, *device_tests, *loader_tests),), 120, "tests.log"),
        Phase("sanitizer", sanitizer_commands(python, rehearse), 60, "sanitizer.log"),
        Phase("bench", (loader_bench, (*bench, *rest)), 300, "bench.log",
              budget_option="--seconds"),
        Phase("tests on the CPU", ((*pytest, "tests/ops"),), 120, "cpu_tests.log", optional=True),
    ]  # fmt: skip


def sanitizer_commands(python: str, rehearse: bool) -> tuple[tuple[str, ...], ...]:
    calls = (python, "-m", "ops.sanitized")
    if rehearse:
        return ((*calls, "cpu"), (*calls, "cpu", "few"))
    sanitizer = find_tool("compute-sanitizer", python)
    if sanitizer is None:
        return ()
    # Only our kernels are checked, whose mangled names hold the namespace: torch's are not ours to
    # check. Nor are CUDA calls that fail, for torch tries some that may.
    check = (sanitizer, "--error-exitcode", "99", "--report-api-errors", "no",
             "--kernel-name", "kernel_substring=toppings", "--tool")  # fmt: skip
    # Racecheck is the slow one: one case for each tile and kind of product.
    return ((*check, "memcheck", *calls), (*check, "racecheck", *calls, "cuda", "few"))


def run(command: tuple[str, ...], limit_s: float, log: Path) -> str:
    """How it ended: "passed", or what went wrong."""
    # The package, and ops.sanitized: another project's `tests` may be installed.
    paths = [str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    variables = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        # Of the sanitizer alone: an access beyond a tensor is then one beyond an allocation.
        **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in command[0] else {}),
    }
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit_s:.0f} s"
    return "passed" if code == 0 else f"FAILED, exit status {code}"


def run_phase(phase: Phase, out: Path, end: float) -> bool:
    log = out / phase.log
    log.unlink(missing_ok=True)
    passed = True
    for command in phase.commands:
        start = perf_counter()
        limit = min(phase.limit_s, end - start)
        rest = 0
        if phase.budget_option is not None:
            rest = BUDGET_REST_S
            command = (*command, phase.budget_option, str(int(limit - rest)))
        if limit >= LEAST_S + rest:
            how = run(command, limit, log)
            passed &= how == "passed"
        else:
            how = "no time left"
            passed &= phase.optional
        print(f"{phase.name}: {how}, {perf_counter() - start:.0f} s ({log})", flush=True)
    if log.is_file():
        text = log.read_text(errors="replace").splitlines()
        print("\n".join(f"    {line[:200]}" for line in text[-(6 if passed else 25) :]), flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds, tests and measures on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, as far as it goes")
    parser.add_argument("--commit", default="", help="where the working tree has no .git")
    args = parser.parse_args()
    start = perf_counter()
    lines = environment(sys.executable)
    if lines:
        print("\n".join(lines))
    card = ask_torch(sys.executable)
    if card is None and not args.rehearse:
        print("no GPU: torch sees none")
        return 1
    if any(line.startswith(("missing", "too old")) for line in lines):
        return 1
    name, arch, torch_version = card or ("no GPU, a rehearsal", "90", "")
    print(f"{name}, sm_{arch}, torch {torch_version}, Python {sys.version.split()[0]}", flush=True)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    phases = make_phases(sys.executable, out, arch, args.rehearse, args.commit)
    passed = []
    for phase in phases:
        if not phase.commands:
            print(f"{phase.name}: absent: compute-sanitizer was not found", flush=True)
            continue
        passed.append(run_phase(phase, out, start + TOTAL_S))
    print(f"{sum(passed)} of {len(passed)} phases passed, {perf_counter() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
