# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, on a machine that has one: `make gpu`.

It takes the Python that runs it and what is installed there, and no network. A phase that fails or
outlasts its limit doesn't keep the others from running; the exit status says whether all passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
# pip's name where it isn't the module's: what is needed, and what only something is needed for.
NEEDED = ("torch", "numpy", "safetensors", "setuptools", "pybind11", "pytest")
USEFUL = {
    "hypothesis": "tests/ops/test_accuracy.py",
    "transformers": "tests of the engine",
    "peft": "none of these phases",
    "rich": "bench/ops.py on the CPU",
    "triton": "vLLM's and SGLang's operators",
    "matplotlib": "the figure",
}
TOTAL_S = 570  # of all phases
BUDGET_REST_S = 45  # of a planned phase: to start, and to finish what it has begun
LEAST_S = 20  # a phase that has less left isn't begun
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


def environment(python: str) -> list[str]:
    """A line for everything that is missing; the needed first."""
    lines = [f"missing: {name}: pip install {name}" for name in NEEDED if find_spec(name) is None]
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
    for tool in ("cmake", "ninja", "nvcc"):
        if shutil.which(tool, path=path) is None:
            lines.append(f"missing: {tool}: not on PATH")
    lines += [f"absent: {name}, for {use}" for name, use in USEFUL.items() if not find_spec(name)]
    return lines


def ask_torch(python: str) -> tuple[str, str, str] | None:
    """The GPU's name, its architecture, torch's version; None without a GPU or without torch."""
    done = subprocess.run([python, "-c", ASK_TORCH], capture_output=True, text=True)
    fields = done.stdout.strip().split("|")
    return (fields[0], fields[1], fields[2]) if len(fields) == 3 else None


def make_phases(python: str, out: Path, arch: str, rehearse: bool, commit: str) -> list[Phase]:
    build = (python, "setup.py", "-q", "build_ext", "--inplace", "--allow-warnings")
    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider")
    device_tests = tuple(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/ops/test_cuda*"))
    bench = (python, "bench/ops.py", "--device", "cuda", "--out", str(out))
    rest = ("--rehearse",) if rehearse else ()
    rest += ("--commit", commit) if commit else ()
    return [
        Phase("build", ((*build, f"--cuda-archs={arch}-real"),), 240, "build.log"),
        Phase("tests", ((*pytest, f"--junitxml={out / 'tests.xml'}", *device_tests),), 120,
              "tests.log"),
        Phase("sanitizer", sanitizer_commands(python, rehearse), 60, "sanitizer.log"),
        Phase("bench", ((*bench, *rest),), 300, "bench.log", budget_option="--seconds"),
        Phase("tests on the CPU", ((*pytest, "tests/ops"),), 120, "cpu_tests.log", optional=True),
    ]  # fmt: skip


def sanitizer_commands(python: str, rehearse: bool) -> tuple[tuple[str, ...], ...]:
    if rehearse:
        return ((python, "-m", "tests.ops.sanitized", "cpu"),)
    if shutil.which("compute-sanitizer") is None:
        return ()
    return tuple(
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "99", python, "-m",
         "tests.ops.sanitized")
        for tool in ("memcheck", "racecheck")
    )  # fmt: skip


def run(command: tuple[str, ...], limit_s: float, log: Path) -> str:
    """How it ended: "passed", or what went wrong."""
    variables = {
        "PYTHONPATH": str(ROOT / "python"),
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
        if phase.budget_option is not None:
            command = (*command, phase.budget_option, str(int(limit - BUDGET_REST_S)))
        if limit > LEAST_S:
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
    if any(line.startswith("missing") for line in lines):
        return 1
    name, arch, torch_version = card or ("no GPU, a rehearsal", "90", "")
    print(f"{name}, sm_{arch}, torch {torch_version}, Python {sys.version.split()[0]}", flush=True)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    phases = make_phases(sys.executable, out, arch, args.rehearse, args.commit)
    passed = []
    for phase in phases:
        if not phase.commands:
            print(f"{phase.name}: absent: compute-sanitizer is not on PATH", flush=True)
            continue
        passed.append(run_phase(phase, out, start + TOTAL_S))
    print(f"{sum(passed)} of {len(passed)} phases passed, {perf_counter() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
