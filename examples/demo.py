# SPDX-License-Identifier: Apache-2.0
"""One base model serves a mixed stream of requests for five LoRA adapters and for itself.

Requests arrive at random moments while others are running; all share every forward pass, and only
three adapters have a slot at once, so they come and go. Prints what each adapter answers, then
the latencies, and writes demo.json and demo.png.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import toppings
from smollm2 import ADAPTERS, NAME, QUESTIONS, chat_ids, load_smollm2

BASE = "(base)"
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Job:
    """One request of the stream, and when it is due."""

    due: float  # seconds from the start
    adapter: str
    question: str
    request: toppings.Request | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals per second (Poisson)")
    parser.add_argument("--slots", type=int, default=3, help="adapters resident at once")
    parser.add_argument(
        "--link",
        type=float,
        metavar="GB/s",
        help="an emulated link to the adapters' arena; without one they are used where they lie",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=best_dtype())
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo")
    args = parser.parse_args()
    console = Console()

    with console.status(f"Loading {NAME} ({args.dtype}) ..."):
        model, tokenizer = load_smollm2(getattr(torch, args.dtype))
        engine = toppings.Engine(
            model, max_slots=args.slots, link=toppings.Link(args.link * 1e9) if args.link else None
        )
        adapters = {
            p.name: toppings.read_adapter(p) for p in sorted(ADAPTERS.iterdir()) if p.is_dir()
        }
        for name in adapters:
            engine.add_adapter(name, ADAPTERS / name)
    jobs = stream([*adapters, BASE], args.requests, args.rate, args.seed)
    start = serve(engine, tokenizer, jobs, console)
    ranks = {name: list(adapter.ranks) for name, adapter in adapters.items()} | {BASE: []}

    console.print(answers(jobs, tokenizer, list(ranks)))
    console.print(latencies(jobs, ranks))
    result = report(jobs, ranks, engine, tokenizer, start, args)
    totals = result["totals"]
    console.print(
        f"{totals['requests']} requests, {len(adapters)} adapters in {args.slots} slots:"
        f" {totals['output_tokens']} tokens in {totals['seconds']:.1f} s ="
        f" [bold]{totals['tokens_per_second']:.1f} tokens/s[/], {totals['passes']} passes,"
        f" {totals['loads']} adapter loads ({engine.stats().device})"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out / "demo.png")
    console.print(f"Wrote demo.json and demo.png in {os.path.relpath(args.out)}")


def best_dtype() -> str:
    """bfloat16 where the CPU multiplies it natively; elsewhere its GEMMs are slower than fp32."""
    return "bfloat16" if toppings.cpu.level() == "avx512_bf16" else "float32"


def stream(names: list[str], count: int, rate: float, seed: int) -> list[Job]:
    """Every adapter in turn asks every question in turn; the arrivals are random."""
    rng = random.Random(seed)
    pairs = [(name, question) for question in QUESTIONS for name in names]
    due, jobs = 0.0, []
    for i in range(count):
        name, question = pairs[i % len(pairs)]
        jobs.append(Job(due, name, question))
        due += rng.expovariate(rate)
    return jobs


def serve(engine: toppings.Engine, tokenizer, jobs: list[Job], console: Console) -> float:
    """Submits jobs when they are due and steps the engine until all have finished."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    ]
    prompts = [chat_ids(tokenizer, job.question) for job in jobs]
    params = toppings.SamplingParams(max_tokens=32)
    start, submitted = time.perf_counter(), 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Serving", total=len(jobs), state="")
        while submitted < len(jobs) or engine.has_work:
            now = time.perf_counter() - start
            while submitted < len(jobs) and jobs[submitted].due <= now:
                job = jobs[submitted]
                name = None if job.adapter == BASE else job.adapter
                job.request = engine.submit(prompts[submitted], params, adapter=name)
                submitted += 1
            if not engine.step():
                time.sleep(0.001)
            done = sum(job.request is not None and job.request.finished for job in jobs)
            stats = engine.stats()
            state = f"{stats.running} running, {stats.waiting} waiting, {stats.loads} loads"
            progress.update(task, completed=done, state=state)
    return start


def answers(jobs: list[Job], tokenizer, names: list[str]) -> Table:
    table = Table(title="What each adapter answers", show_lines=True)
    asked = list(dict.fromkeys(job.question for job in jobs))[:3]
    for header in ["adapter", *asked]:
        table.add_column(header)
    for name in names:
        found = {job.question: job.request for job in jobs if job.adapter == name}
        cells = [text_of(found[q], tokenizer) if q in found else "" for q in asked]
        table.add_row(name, *cells)
    return table


def text_of(request: toppings.Request, tokenizer) -> str:
    return tokenizer.decode(request.output, skip_special_tokens=True).strip()


def latencies(jobs: list[Job], ranks: dict[str, list[int]]) -> Table:
    table = Table(title="Latency by adapter (ms)")
    for header in [
        "adapter",
        "ranks",
        "requests",
        "TTFT p50",
        "TTFT max",
        "per token p50",
        "tokens",
    ]:
        table.add_column(header, justify="left" if header == "adapter" else "right")
    for name, rank in ranks.items():
        requests = [job.request for job in jobs if job.adapter == name]
        if not requests:
            continue
        ttft = [1e3 * r.ttft for r in requests]
        tpot = [1e3 * r.tpot for r in requests if r.tpot is not None]
        table.add_row(
            name,
            ",".join(map(str, rank)) or "-",
            str(len(requests)),
            f"{statistics.median(ttft):.0f}",
            f"{max(ttft):.0f}",
            f"{statistics.median(tpot):.0f}" if tpot else "-",
            str(sum(len(r.output) for r in requests)),
        )
    return table


def report(jobs: list[Job], ranks, engine, tokenizer, start: float, args) -> dict:
    """Everything that was measured, in seconds from the start."""
    rows = [
        {
            "adapter": job.adapter,
            "question": job.question,
            "answer": text_of(job.request, tokenizer),
            "arrival": job.request.arrival_time - start,
            "tokens": [t - start for t in job.request.token_times],
            "ttft": job.request.ttft,
            "tpot": job.request.tpot,
            "finish_reason": job.request.finish_reason,
        }
        for job in jobs
    ]
    seconds = max(row["tokens"][-1] for row in rows)
    tokens = sum(len(row["tokens"]) for row in rows)
    stats = engine.stats()
    return {
        "model": NAME,
        "dtype": args.dtype,
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "level": toppings.cpu.level(),
        },
        "versions": {"toppings": toppings.__version__, "torch": torch.__version__},
        "settings": {"rate": args.rate, "slots": args.slots, "seed": args.seed},
        "ranks": ranks,
        "totals": {
            "requests": len(rows),
            "output_tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "passes": stats.steps,
            "loads": stats.loads,
            "preemptions": stats.preemptions,
        },
        "requests": rows,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def draw(result: dict, path: Path) -> None:
    """One line per request: waiting for its first token in grey, then a dot per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(result["ranks"], plt.get_cmap("Dark2").colors, strict=False))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for y, row in enumerate(result["requests"]):
        color, tokens = colors[row["adapter"]], row["tokens"]
        axes.plot([row["arrival"], tokens[0]], [y, y], color="0.8", lw=3, solid_capstyle="butt")
        axes.plot([tokens[0], tokens[-1]], [y, y], color=color, lw=1)
        axes.plot(tokens, [y] * len(tokens), "|", color=color, ms=5)
    for name, color in colors.items():
        ranks = ", ".join(map(str, result["ranks"][name]))
        axes.plot([], [], color=color, lw=3, label=f"{name} (rank {ranks})" if ranks else name)
    axes.plot([], [], color="0.8", lw=3, label="waiting for the first token")
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_ylabel("request, by arrival")
    totals, machine, slots = result["totals"], result["machine"], result["settings"]["slots"]
    axes.set_title(
        f"{totals['requests']} requests, {len(colors) - 1} adapters in {slots} slots,"
        f" one base model: {totals['tokens_per_second']:.0f} tokens/s\n"
        f"{result['model']} ({result['dtype']}), {machine['threads']} threads of {machine['cpu']},"
        " `make demo`",
        fontsize=9,
    )
    axes.legend(fontsize=8, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
