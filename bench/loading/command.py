# SPDX-License-Identifier: Apache-2.0
"""The command line of bench/loader.py.

docs/benchmarks.md says how it is measured. A full run on the host writes its results there and into
bench/results; any other only where --out says.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from machine import Load, describe_machine, git_commit

from loading.bandwidth import measure_bandwidth
from loading.cases import CUDA, FULL, MB, QUICK, TINY, Link, Plan
from loading.concurrent import measure_concurrent
from loading.overhead import load_library, measure_overhead
from loading.plain_copy import plain_copy
from loading.results import Report, load, save, size
from loading.rig import ROW_BYTES, Cores, Rig, open_device
from loading.rounds import on_core
from loading.table import report_text

ROOT = Path(__file__).resolve().parents[2]
JSON, OUT = Path("bench/results/loader.json"), Path("build/bench")
FIGURE, DOCS = Path("docs/loader.png"), Path("docs/benchmarks.md")
PARTS = ("bandwidth", "overhead", "concurrent", "prefill", "decode")
MEMCPY_BYTES = 32 * MB


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loader.py", description="Benchmarks the layer-wise loader, alone and in the engine."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="a few cases, few rounds: a minute")
    parser.add_argument("--tiny", action="store_true", help="all of it within seconds, for tests")
    parser.add_argument(
        "--disturbed", action="store_true", help="show disturbed cases too (as with cuda)"
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", help="default: all")
    parser.add_argument("--seconds", type=float, help="begin no further case after so many")
    parser.add_argument("--seed", type=int, help="a fresh one if left out")
    parser.add_argument("--commit", help="where the working tree has no .git")
    parser.add_argument("--out", type=Path, help=f"folder, where {DOCS} isn't; default: {OUT}")
    parser.add_argument(
        "--report", action="store_true", help=f"measure nothing, rewrite {DOCS} from {JSON}"
    )
    args = parser.parse_args(arguments)
    limits = (args.quick, args.tiny, args.only, args.seconds, args.out, args.disturbed)
    limits += (args.device == "cuda",)
    args.limited = any(limits)
    if args.report and args.limited:
        parser.error("--report: expected no other option, it shows the last full run")
    args.only = args.only or PARTS
    args.seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    return args


def choose_plan(args: argparse.Namespace) -> Plan:
    if args.tiny:
        return TINY
    if args.device == "cuda":
        return CUDA
    return QUICK if args.quick else FULL


def choose_cores() -> Cores:
    """The first and the last that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("cores: expected two, one to compute and one to copy, got one")
    return Cores(compute=cores[0], link=cores[-1])


class Runner:
    """Runs cases one after the other, as long as there is time."""

    def __init__(self, progress, end: float) -> None:
        self.end, self.left_out = end, 0
        self._progress = progress

    def run(self, text: str, case: Callable):
        """None when the time has run out."""
        if perf_counter() > self.end:
            self.left_out += 1
            return None
        with self._progress(text):
            return case()


def run(args: argparse.Namespace, progress) -> Report:
    plan, cores = choose_plan(args), choose_cores()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch sees none")
    kind = "cuda" if args.device == "cuda" else "host"
    machine, load_meter, start = describe_machine(), Load(), perf_counter()
    runner = Runner(progress, start + (args.seconds or float("inf")))
    torch.set_num_threads(1)
    absent: list[str] = []
    parts: dict[str, list] = {part: [] for part in PARTS}
    with on_core(cores.compute), torch.inference_mode():
        memcpy = min(plain_copy("host", MEMCPY_BYTES, cores)().total for _ in range(5))
        if "overhead" in args.only:
            run_overhead(parts, absent, runner, plan, cores)
        if "bandwidth" in args.only:
            for link in plan.links:
                for block in plan.blocks:
                    text = f"{open_device(kind, link, cores).name}, blocks of {size(block)}"
                    job = partial_call(measure_bandwidth, kind, link, block, plan, cores)
                    parts["bandwidth"].append(runner.run(text, job))
        if "concurrent" in args.only:
            for link in plan.concurrent_links:
                text = f"{open_device(kind, link, cores).name}, concurrent loads"
                job = partial_call(measure_concurrent, kind, link, plan, cores)
                parts["concurrent"] += runner.run(text, job) or []
        if {"prefill", "decode"} & set(args.only):
            run_engine(parts, absent, runner, args, kind, plan, cores)
    if runner.left_out:
        absent.append(f"{runner.left_out} cases: no time left")
    return Report(
        command=shlex.join(["python", "bench/loader.py", *sys.argv[1:]]),
        commit=args.commit or git_commit(ROOT),
        seed=args.seed,
        seconds=round(load_meter.seconds(), 1),
        others_cores=round(load_meter.others_cores(), 2),
        machine=machine,
        device=open_device(kind, Link(), cores).name,
        cores=f"computing and waiting on core {cores.compute}, copying on core {cores.link}",
        memcpy_gb_s=MEMCPY_BYTES / memcpy / 1e9,
        # A GPU's machine has many cores, and others on them don't reach its link.
        shows_disturbed=args.disturbed or kind == "cuda",
        absent=absent,
        **{part: [case for case in cases if case is not None] for part, cases in parts.items()},
    )


def partial_call(function: Callable, *arguments) -> Callable:
    return lambda: function(*arguments)


def run_overhead(parts: dict, absent: list[str], runner: Runner, plan: Plan, cores: Cores) -> None:
    try:
        library = load_library(ROOT)
    except FileNotFoundError as error:
        absent.append(f"host work per layer: {error}")
        return
    job = partial_call(
        measure_overhead, library, plan.overhead_layers, plan.overhead_repeats, cores
    )
    parts["overhead"] += runner.run("host work per layer", job) or []


def run_engine(
    parts: dict,
    absent: list[str],
    runner: Runner,
    args: argparse.Namespace,
    kind: str,
    plan: Plan,
    cores: Cores,
) -> None:
    if find_spec("transformers") is None:
        absent.append("cold prefills and decode: transformers is not installed")
        return
    from loading import model
    from loading.decode import measure_decode
    from loading.prefill import layer_compute, measure_prefill

    try:
        if args.tiny:
            base = model.random_llama(args.seed, "cpu", **model.SMALL)
        elif kind == "cuda":
            base = model.random_llama(args.seed, "cuda", **model.BILLION)
        else:
            base = model.load_smollm2(args.seed)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        absent.append(f"cold prefills and decode: {error}")
        return
    if "prefill" in args.only:
        for rank in plan.ranks:
            bytes_ = base.layer_bytes(rank)
            compute = None if kind == "cuda" else layer_compute(base, rank, plan, cores)
            for ratio in plan.ratios:
                if compute is None:
                    link, transfer, asked = Link(), real_transfer(bytes_, base.layers, cores), None
                else:
                    transfer, asked = ratio * compute, ratio
                    link = Link(bytes_ / transfer)
                job = partial_call(
                    measure_prefill,
                    *(base, partial_call(open_device, kind, link, cores)),
                    *(rank, asked, transfer, plan, cores),
                )
                text = f"cold prefills, rank {rank}" + (f", ratio {ratio}" if asked else "")
                parts["prefill"].append(runner.run(text, job))
    if "decode" in args.only:
        for rate in plan.decode_rates:
            link = Link() if kind == "cuda" else Link(rate)
            for whom in ("nobody", "queued requests"):
                device = open_device(kind, link, cores)
                job = partial_call(
                    measure_decode, base, device, plan.decode_rank, whom, plan, cores
                )
                parts["decode"].append(runner.run(f"{device.name}, loads for {whom}", job))


def real_transfer(layer_bytes: int, layers: int, cores: Cores) -> float:
    """Seconds of a layer on the GPU's link."""
    block = layer_bytes // ROW_BYTES * ROW_BYTES
    rig = Rig(open_device("cuda", Link(), cores), cores, layers, block)
    return median([rig.load().transfer for _ in range(9)][2:]) * layer_bytes / block


def main(arguments: list[str]) -> int:
    args = parse_args(arguments)
    if args.report:
        report = load(ROOT / JSON)
    else:
        from loading.progress import show_progress

        with show_progress() as progress:
            report = run(args, progress)
    print(report_text(report))
    if args.limited or report.absent:
        out = args.out or ROOT / OUT
        save(report, out / "loader.json")
        print(f"written: {out / 'loader.json'}")
        return 0
    from loading.figure import save_figure
    from loading.section import write_section

    if not args.report:
        save(report, ROOT / JSON)
    save_figure(report, ROOT / FIGURE)
    write_section(report, ROOT / DOCS)
    print(f"written: {JSON}, {FIGURE}, {DOCS}")
    return 0
