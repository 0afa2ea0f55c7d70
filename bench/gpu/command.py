# SPDX-License-Identifier: Apache-2.0
"""The command line of `bench/ops.py --device cuda`."""

from __future__ import annotations

import argparse
import re
import secrets
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
from machine import git_commit

from gpu.cases import Case, make_cases, tiny_cases
from gpu.clock import Clock
from gpu.device import describe, open_device
from gpu.measure import measure
from gpu.peaks import measure_peaks
from gpu.peers import Peer, find_peers
from gpu.peers.interface import Absent, one_line
from gpu.results import MODES, Report, Result, save
from gpu.table import report_lines

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("build/gpu")


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ops.py --device cuda", description="The LoRA operator beside its peers on a GPU."
    )
    parser.add_argument("--full", action="store_true", help="the whole grid, at every site")
    parser.add_argument("--only", type=re.compile, help="cases whose label matches this regex")
    parser.add_argument("--without", nargs="+", default=[], help="peers, as the table names them")
    parser.add_argument("--seconds", type=float, default=270, help="in all; default: %(default)s")
    parser.add_argument("--round-seconds", type=float, default=0.25, help="a case and mode")
    parser.add_argument("--seed", type=int, help="a fresh one if left out")
    parser.add_argument("--commit", help="where the working tree has no .git")
    parser.add_argument("--out", type=Path, default=OUT, help="folder; default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="all of it on the CPU, tiny")
    args = parser.parse_args(arguments)
    args.seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    return args


def choose_cases(args: argparse.Namespace) -> list[Case]:
    cases = tiny_cases() if args.rehearse else make_cases(args.full)
    if args.only:
        cases = [case for case in cases if args.only.search(case.label)]
    if not cases:
        raise SystemExit(f"--only: expected a regex that matches a case, got {args.only.pattern}")
    return cases


def run_all(
    cases: list[Case],
    peers: list[Peer],
    clock: Clock,
    device: torch.device,
    args: argparse.Namespace,
    end: float,
) -> tuple[list[Result], str | None]:
    """And the error that ended it before its time: after an illegal access nothing works."""
    results: list[Result] = []
    seconds = 0.0 if args.rehearse else args.round_seconds
    for number, case in enumerate(cases):
        if perf_counter() > end:
            break
        try:
            result = measure(case, peers, clock, device, args.seed, seconds)
        except Exception as error:  # whatever it is, what was measured before is saved
            return results, f"{case.label}: {one_line(error)}"
        results.append(result)
        times = ", ".join(f"{mode} {result.us(mode) or float('nan'):.1f} µs" for mode in MODES)
        print(f"{number + 1}/{len(cases)} {case.label}: {times}", flush=True)
    return results, None


def run(args: argparse.Namespace) -> Report:
    start = perf_counter()
    device, clock = open_device(args.rehearse)
    card = describe(device)  # now: after an illegal access it can't be asked
    cases = choose_cases(args)
    peers, absent = find_peers()
    absent += [Absent(peer.name, "--without") for peer in peers if peer.name in args.without]
    peers = [peer for peer in peers if peer.name not in args.without]
    for peer in absent:
        print(f"{peer.name} is absent: {peer.reason}", flush=True)
    sizes = {"megabytes": 1, "size": 64, "repeats": 3} if args.rehearse else {}
    with torch.inference_mode():
        peaks = measure_peaks(clock, device, **sizes)
        end = start + args.seconds
        results, stopped = run_all(cases, peers, clock, device, args, end)
        if stopped is None:
            peaks = peaks.best(measure_peaks(clock, device, **sizes))
    return Report(
        command=shlex.join(["python", "bench/ops.py", *sys.argv[1:]]),
        commit=args.commit or git_commit(ROOT),
        seed=args.seed,
        rehearsal=args.rehearse,
        seconds=round(perf_counter() - start, 1),
        left_out=len(cases) - len(results),
        stopped=stopped,
        device=card,
        versions={peer.name: peer.version for peer in peers},
        absent=absent,
        peaks=peaks,
        results=results,
    )


def main(arguments: list[str]) -> int:
    args = parse_args(arguments)
    report = run(args)
    print("\n".join(report_lines(report)))
    save(report, args.out / "ops.json")
    print(f"written: {args.out / 'ops.json'}")
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed")
    else:
        from gpu.figure import save_figure

        save_figure(report, args.out / "ops.png")
        print(f"written: {args.out / 'ops.png'}")
    return 1 if report.failed else 0
