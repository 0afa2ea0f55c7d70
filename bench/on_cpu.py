# SPDX-License-Identifier: Apache-2.0
"""The command line of `bench/ops.py --device cpu`.

docs/benchmarks.md says how it is measured. A full run writes its results there and into
bench/results; a limited one (--quick, --only, --threads, --dtype) only into build/bench.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shlex
import sys
from itertools import groupby
from pathlib import Path

import torch
from cases import SIZES, Case, make_cases
from figure import save_figure
from inputs import Pool, pool_count
from machine import Load, describe_machine, git_commit
from measure import measure
from peaks import Peaks, load_library, measure_peaks
from peers import Peer, find_peers
from plain_read import prepare_read
from results import Report, Result, load, save
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from section import write_section
from table import count, print_report

ROOT = Path(__file__).resolve().parent.parent
JSON, LIMITED_JSON = Path("bench/results/ops.json"), Path("build/bench/ops.json")
FIGURE, DOCS = Path("docs/ops.png"), Path("docs/benchmarks.md")
POOL_CACHES = 3  # a cold pool holds so many L3 caches


def run_all(
    cases: list[Case], peers: list[Peer], pool_bytes: int, seed: int, seconds: float
) -> list[Result]:
    columns = (TextColumn("{task.description:64}"), BarColumn(), MofNCompleteColumn())
    results: list[Result] = []
    # Refreshed by hand: a refreshing thread would disturb the timing.
    with Progress(
        *columns,
        TimeElapsedColumn(),
        auto_refresh=False,
        transient=True,
        disable=not sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task("", total=len(cases))
        for _, group in groupby(cases, key=lambda case: (case.threads, case.pool)):
            members = list(group)
            torch.set_num_threads(members[0].threads)
            pool = Pool(members[0], pool_count(members, pool_bytes), seed)
            for case in members:
                text = f"{case.label}, {case.width_label}, {case.dtype}, {count(case.threads)}"
                progress.update(task, description=text, refresh=True)
                results.append(measure(case, pool, peers, seed, seconds, prepare_read))
                progress.update(task, advance=1, refresh=True)
    return results


def measure_all_peaks(threads: list[int], repeats: int) -> list[Peaks]:
    library = load_library(ROOT)
    return [measure_peaks(library, number, repeats) for number in threads]


def parse_args(arguments: list[str]) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="ops.py", description="Benchmarks the LoRA operator beside its peers."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu; cuda has its own")
    parser.add_argument("--quick", action="store_true", help="a few cases, few rounds")
    parser.add_argument("--threads", type=int, nargs="+", help=f"default: 1 {cores}")
    parser.add_argument("--dtype", choices=SIZES, nargs="+", help="default: all")
    parser.add_argument("--only", type=re.compile, help="cases whose label matches this regex")
    parser.add_argument("--seed", type=int, help="a fresh one if left out")
    parser.add_argument(
        "--report", action="store_true", help=f"measure nothing, rewrite {DOCS} from {JSON}"
    )
    args = parser.parse_args(arguments)
    args.limited = bool(args.quick or args.threads or args.dtype or args.only)
    if args.report and args.limited:
        parser.error("--report: expected no other option, it shows the last full run")
    args.threads = sorted(set(args.threads or (1, cores)))
    if args.threads[0] < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads[0]}")
    args.dtype = args.dtype or (["bf16"] if args.quick else list(SIZES))
    args.seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    return args


def run(args: argparse.Namespace) -> Report:
    cases = make_cases(args.threads, args.dtype, args.quick)
    if args.only:
        cases = [case for case in cases if args.only.search(f"{case.label}, {case.width_label}")]
    if not cases:
        raise SystemExit(f"--only: expected a regex that matches a case, got {args.only.pattern}")
    machine, load_meter = describe_machine(), Load()
    peers, absent = find_peers(ROOT)
    repeats = 5 if args.quick else 20
    seconds = 0.3 if args.quick else 1.5
    with torch.inference_mode():
        before = measure_all_peaks(args.threads, repeats)
        results = run_all(cases, peers, POOL_CACHES * machine.l3_bytes, args.seed, seconds)
        after = measure_all_peaks(args.threads, repeats)
    return Report(
        command=shlex.join(["python", "bench/ops.py", *sys.argv[1:]]),
        commit=git_commit(ROOT),
        seed=args.seed,
        seconds=round(load_meter.seconds(), 1),
        others_cores=round(load_meter.others_cores(), 2),
        versions={peer.name: peer.version for peer in peers},
        absent=absent,
        machine=machine,
        peaks_before=before,
        peaks_after=after,
        results=results,
    )


def main(arguments: list[str]) -> int:
    args = parse_args(arguments)
    report = load(ROOT / JSON) if args.report else run(args)
    print_report(report)
    if report.absent:
        print(f"{DOCS} stays as it is: it shows runs with all peers (make bench-peers)")
    if args.limited or report.absent:
        save(report, ROOT / LIMITED_JSON)
        print(f"written: {LIMITED_JSON}")
        return 0
    if not args.report:
        save(report, ROOT / JSON)
    save_figure(report, ROOT / FIGURE)
    write_section(report, ROOT / DOCS)
    print(f"written: {JSON}, {FIGURE}, {DOCS}")
    return 0
