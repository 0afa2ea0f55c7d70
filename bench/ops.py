# SPDX-License-Identifier: Apache-2.0
"""torch.ops.toppings.lora_forward_ against plain torch, paired and alternating.

Every round times each implementation once, in an order that reverses from round to round; a ratio
is the median over the rounds of (peer's time / toppings' time), so that noise which lasts longer
than a round cancels. Another process on the same cores doesn't cancel: threads that spin for one
another then lose whole time slices. A case during which others were busy is marked; with more than
one thread its numbers mean nothing.

Distinct-adapter decode takes its weights from a pool larger than the L3 cache, and every timed call
takes the next ones; all other cases reuse theirs.
"""

from __future__ import annotations

import argparse
import gc
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter, perf_counter_ns

import torch
from machine import Load, Machine, Peaks, describe_machine, git_commit, measure_peaks
from report import Result, print_report, save_figure, save_json, summarize
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import toppings
from toppings import reference

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # of the norm, as in tests/ops
PEER_SLACK = 4  # torch rounds v and the delta to the dtype of x
WIDTHS = (576, 4096, 4160)
MIXED = (8, 16, 32, 64)
MAX_ROUNDS = 1000
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One call: equal runs of tokens, one for each adapter; K = N = width, one projection."""

    name: str
    tokens: int
    ranks: tuple[int, ...]  # one for each adapter in use
    width: int
    cold: bool  # weights from a pool larger than L3

    def __post_init__(self) -> None:
        if self.tokens % len(self.ranks) != 0:
            raise ValueError(f"tokens: expected a multiple of {len(self.ranks)}, got {self.tokens}")

    @property
    def segment(self) -> int:
        return self.tokens // len(self.ranks)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return 2 * sum(self.ranks) * self.width * dtype.itemsize

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """The weights at their own ranks, x read, y read and written."""
        return self.weight_bytes(dtype) + 3 * self.tokens * self.width * dtype.itemsize

    def flops(self) -> int:
        return 4 * self.segment * sum(self.ranks) * self.width


@dataclass
class Call:
    """The arguments of one call, prepared for each implementation."""

    args: tuple  # of lora_forward_
    loop: list[tuple[slice, Tensor, Tensor, float]]  # tokens, A [r, K], B [r, N], scale
    index: Tensor  # of the adapters in the stacked weights


@dataclass
class Inputs:
    """What the calls of a case share. y is set back to y_start before every call."""

    case: Case
    x: Tensor  # [T, K]
    y: Tensor  # [T, N]
    y_start: Tensor
    stacked_a: Tensor  # [L, max r, K], zero rows above an adapter's own rank
    stacked_b: Tensor  # [L, max r, N]
    stacked_scales: Tensor  # [L, 1, 1]
    calls: list[Call]


Implementation = Callable[[Inputs, Call], None]


def make_cases(quick: bool) -> list[Case]:
    cases = []
    for width in WIDTHS:
        shapes = [
            ("decode T=1, r=16", 1, (16,), True),
            ("decode T=16, r=16", 16, (16,) * 16, True),
            ("decode T=64, r=16", 64, (16,) * 64, True),
            ("decode T=16, r=8-64", 16, MIXED * 4, True),
            ("decode T=64, r=8-64", 64, MIXED * 16, True),
            ("one adapter T=64, r=16", 64, (16,), False),
            ("prefill T=512, r=16", 512, (16,), False),
            ("prefill T=512, r=64", 512, (64,), False),
            ("prefill 32 × 16, r=16", 512, (16,) * 32, False),
        ]
        cases += [Case(name, tokens, ranks, width, cold) for name, tokens, ranks, cold in shapes]
    return [case for case in cases if case.width != 4096] if quick else cases


def pool_sets(case: Case, dtype: torch.dtype, machine: Machine) -> int:
    """How many sets of weights a cold case rotates through: three L3 caches, memory permitting."""
    if not case.cold:
        return 1
    pool = min(3 * machine.l3_bytes, machine.memory_bytes // 16)
    return max(2, -(-pool // case.weight_bytes(dtype)))


def make_inputs(case: Case, dtype: torch.dtype, seed: int, sets: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.tensor(case.ranks * sets)
    total = int(ranks.sum())

    def randn(rows: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(rows, case.width, dtype=dtype)
        return values.normal_(0, scale, generator=generator)

    # Columns of B[r, :] sum r terms: 1 / sqrt(r) keeps the delta as large as y.
    a, b = randn(total, case.width**-0.5), randn(total)
    b /= ranks.repeat_interleave(ranks)[:, None].to(dtype) ** 0.5
    signs = 2 * torch.randint(0, 2, (len(ranks),), generator=generator) - 1
    scales = signs * (0.5 + torch.rand(len(ranks), generator=generator))
    scales = scales.to(torch.bfloat16).float()  # exact in every dtype
    starts = ranks.cumsum(0) - ranks
    x, y = randn(case.tokens), randn(case.tokens)
    calls = [make_call(case, x, y, a, b, starts, scales, n) for n in range(sets)]
    return Inputs(
        case=case,
        x=x,
        y=y,
        y_start=y.clone(),
        stacked_a=stack(a, ranks),
        stacked_b=stack(b, ranks),
        stacked_scales=scales.to(dtype)[:, None, None],
        calls=calls,
    )


def make_call(
    case: Case, x: Tensor, y: Tensor, a: Tensor, b: Tensor, starts: Tensor, scales: Tensor, n: int
) -> Call:
    """Call n uses adapters n * len(ranks) and on; a, b hold the rows of all adapters."""
    count, width = len(case.ranks), case.width
    used = slice(n * count, (n + 1) * count)
    offsets = starts[used] * width
    slots = torch.stack([offsets, offsets, torch.tensor(case.ranks)], dim=1)[None]
    token_slots = torch.arange(count, dtype=torch.int32).repeat_interleave(case.segment)
    plan = torch.ops.toppings.lora_plan(token_slots, count)
    head = (y, x, a.view(-1), b.view(-1), slots, scales[None, used].contiguous(), token_slots)
    loop = []
    for i, (start, rank) in enumerate(zip(starts[used].tolist(), case.ranks, strict=True)):
        tokens = slice(i * case.segment, (i + 1) * case.segment)
        rows = slice(start, start + rank)
        loop.append((tokens, a[rows], b[rows], float(scales[used][i])))
    args = (*head, [width], plan, max(case.ranks))
    return Call(args, loop, torch.arange(used.start, used.stop))


def stack(rows: Tensor, ranks: Tensor) -> Tensor:
    """[L, max r, width]: a view where all ranks are equal, else a copy padded with zeros."""
    most = int(ranks.max())
    if int(ranks.min()) == most:
        return rows.view(len(ranks), most, -1)
    stacked = rows.new_zeros(len(ranks), most, rows.shape[1])
    for i, block in enumerate(rows.split(ranks.tolist())):
        stacked[i, : len(block)] = block
    return stacked


def run_toppings(inputs: Inputs, call: Call) -> None:
    torch.ops.toppings.lora_forward_(*call.args)


def run_loop(inputs: Inputs, call: Call) -> None:
    x, y = inputs.x, inputs.y
    for tokens, a, b, scale in call.loop:
        y[tokens] += scale * (x[tokens] @ a.T) @ b


def run_bmm(inputs: Inputs, call: Call) -> None:
    """One batch entry for each adapter, which gathers its weights once, not once a token."""
    shape = (len(inputs.case.ranks), inputs.case.segment, inputs.case.width)
    a, b = inputs.stacked_a[call.index], inputs.stacked_b[call.index]
    v = inputs.stacked_scales[call.index] * torch.bmm(inputs.x.view(shape), a.transpose(1, 2))
    inputs.y.view(shape).add_(torch.bmm(v, b))


IMPLEMENTATIONS: dict[str, Implementation] = {
    "toppings": run_toppings,
    "torch loop": run_loop,
    "gather + bmm": run_bmm,
}


def check(inputs: Inputs, dtype_name: str, seed: int) -> dict[str, float]:
    """Every implementation's error on the last call; raises if one is wrong."""
    call = inputs.calls[-1]
    want = reference.lora_forward(*call.args[:8])
    errors = {}
    for name, run in IMPLEMENTATIONS.items():
        run(inputs, call)
        error = float((inputs.y.double() - want).norm() / want.norm())
        bound = TOLERANCE[dtype_name] * (1 if name == "toppings" else PEER_SLACK)
        if not error <= bound:  # NaN fails too
            raise RuntimeError(
                f"{name}: expected an error up to {bound:g}, got {error:g} "
                f"({inputs.case}, seed {seed})"
            )
        errors[name] = error
        inputs.y.copy_(inputs.y_start)
    return errors


def time_rounds(inputs: Inputs, seconds: float) -> dict[str, list[float]]:
    """µs of every implementation in every round."""
    calls = cycle(inputs.calls)  # a call's weights come up again after all the others
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    order = list(IMPLEMENTATIONS.items())
    for _, run in order:
        time_one(run, inputs, calls)
    end = perf_counter() + seconds
    for count in range(MAX_ROUNDS):
        if count >= MIN_ROUNDS and perf_counter() > end:
            break
        for name, run in order:
            times[name].append(time_one(run, inputs, calls))
        order.reverse()
    return times


def time_one(run: Implementation, inputs: Inputs, calls: Iterator[Call]) -> float:
    call = next(calls)
    inputs.y.copy_(inputs.y_start)
    start = perf_counter_ns()
    run(inputs, call)
    return (perf_counter_ns() - start) / 1e3


def measure(case: Case, dtype_name: str, seed: int, machine: Machine, seconds: float) -> Result:
    dtype = DTYPES[dtype_name]
    sets = pool_sets(case, dtype, machine)
    inputs = make_inputs(case, dtype, seed, sets)
    errors = check(inputs, dtype_name, seed)
    gc.collect()
    gc.disable()
    load = Load()
    try:
        times = time_rounds(inputs, seconds)
        others_cores = load.others_cores()
    finally:
        gc.enable()
    return Result(
        case=case.name,
        width=case.width,
        tokens=case.tokens,
        ranks=list(case.ranks),
        seed=seed,
        weight_sets=sets,
        bytes=case.bytes_moved(dtype),
        flops=case.flops(),
        errors=errors,
        others_cores=round(others_cores, 2),
        times=summarize(times, "toppings"),
    )


def run_all(args: argparse.Namespace, machine: Machine) -> list[Result]:
    cases = make_cases(args.quick)
    seconds = 0.15 if args.quick else 1.1
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    results = []
    # Refreshed by hand: a refreshing thread would disturb the timing.
    with Progress(
        *columns,
        TimeElapsedColumn(),
        auto_refresh=False,
        transient=True,
        disable=not sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task("", total=len(cases))
        for n, case in enumerate(cases):
            progress.update(task, description=f"{case.name}, H={case.width}", refresh=True)
            results.append(measure(case, args.dtype, args.seed + n, machine, seconds))
            progress.update(task, advance=1, refresh=True)
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks the LoRA operator against torch.")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, help="of the first case; a fresh one if left out")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/ops.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/ops.png")
    args = parser.parse_args()
    if args.seed is None:
        args.seed = secrets.randbelow(1 << 31)
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "bench/ops.py", *sys.argv[1:]])
    load = Load()
    with torch.inference_mode():
        machine = describe_machine()
        repeats = 3 if args.quick else 8
        before = measure_peaks(DTYPES[args.dtype], repeats)
        results = run_all(args, machine)
        after = measure_peaks(DTYPES[args.dtype], repeats)
    peaks = Peaks(
        max(before.read_gb_s, after.read_gb_s), max(before.gemm_gflop_s, after.gemm_gflop_s)
    )
    run = {
        "command": command,
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "toppings": toppings.__version__,
        "dtype": args.dtype,
        "seed": args.seed,
        "seconds": round(load.seconds(), 1),
        "others_cores": round(load.others_cores(), 2),
    }
    print_report(run, machine, peaks, results)
    save_json(args.json, run, machine, (before, after), results)
    save_figure(args.figure, run, machine, results)


if __name__ == "__main__":
    main()
