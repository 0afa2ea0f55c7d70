# SPDX-License-Identifier: Apache-2.0
"""The long forms of the runtime's random tests: C++ threads under ThreadSanitizer and
AddressSanitizer, and 100,000 operations against the model. `make soak` runs it.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = {"tsan": "thread", "asan": "address,undefined"}
STRESS_TESTS = 3  # in stress_test, each as long as --seconds says
REPEATED = ["loader_order_test", "loader_faults_test"]


def call(*command: str | Path) -> bool:
    return subprocess.run(list(map(str, command)), cwd=ROOT).returncode == 0


def build(name: str, tests: list[str]) -> bool:
    tools = Path(sys.executable).parent
    cmake = tools / "cmake"
    folder = f"build/{name}"
    options = ["TOPPINGS_TESTS=ON", "TOPPINGS_CUDA=OFF", f"TOPPINGS_SANITIZE={SANITIZERS[name]}"]
    options.append(f"CMAKE_MAKE_PROGRAM={tools / 'ninja'}")
    configure = [cmake, "-S", ".", "-B", folder, "-G", "Ninja", *(f"-D{o}" for o in options)]
    return call(*configure) and call(cmake, "--build", folder, "--target", *tests)


def runner(name: str) -> list[str]:
    """ThreadSanitizer's shadow memory doesn't bear much address randomization, where the kernel
    does more of it than usual.
    """
    setarch = shutil.which("setarch")
    if name != "tsan" or setarch is None:
        return []
    works = subprocess.run([setarch, "-R", "true"], capture_output=True).returncode == 0
    return [setarch, "-R"] if works else []


def cpp_steps(name: str, minutes: float) -> list[tuple[str, Callable[[], bool]]]:
    folder = f"build/{name}/tests/cpp"
    seconds = 60 * minutes / STRESS_TESTS
    steps: list[tuple[str, Callable[[], bool]]] = [
        (f"{name}: build", lambda: build(name, ["stress_test", *REPEATED])),
        (
            f"{name}: stress_test, {STRESS_TESTS} times {seconds:.0f} s",
            lambda: call(*runner(name), f"{folder}/stress_test", f"--seconds={seconds}"),
        ),
    ]
    repeat = ["--gtest_repeat=20", "--gtest_brief=1"]
    for test in REPEATED:
        command = [*runner(name), f"{folder}/{test}", *repeat]
        steps.append((f"{name}: {test}, 20 times", partial(call, *command)))
    return steps


def model_steps(operations: int) -> list[tuple[str, Callable[[], bool]]]:
    sys.path.insert(0, str(ROOT / "tests" / "runtime"))
    import test_slot_model as model

    def run(machine: type, count: int) -> bool:
        model.run(machine, count, is_random=True)  # raises, and tells how to reproduce it
        return True

    in_place = operations // 5
    return [
        (f"model: {operations} operations", lambda: run(model.SlotMachine, operations)),
        (f"model, in place: {in_place} operations", lambda: run(model.InPlaceMachine, in_place)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4, help="of stress under each sanitizer")
    parser.add_argument("--operations", type=int, default=100_000, help="against the model")
    args = parser.parse_args()
    steps = model_steps(args.operations)
    for name in SANITIZERS:
        steps += cpp_steps(name, args.minutes)
    start = time.monotonic()
    failed = []
    for number, (name, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {time.monotonic() - start:5.0f} s  {name}", flush=True)
        try:
            passed = step()
        except Exception as error:  # an assertion of the model's among them
            print(f"{type(error).__name__}: {error}")
            print("\n".join(getattr(error, "__notes__", [])))
            passed = False
        if not passed:
            print(f"FAILED: {name}", flush=True)
            failed.append(name)
    print(f"soak: {len(steps) - len(failed)} of {len(steps)} passed", end="")
    print(f" in {(time.monotonic() - start) / 60:.0f} minutes")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
