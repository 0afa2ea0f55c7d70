# SPDX-License-Identifier: Apache-2.0
"""The loader's benchmark: what it computes from times, and all of it once, tiny."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loading import bars, command, overhead, section
from loading.cases import MB, Link
from loading.results import (
    LINK_TIME,
    MEMCPY,
    Bandwidth,
    Decode,
    Overhead,
    Prefill,
    Report,
    load,
    save,
    size,
)
from loading.rig import Cores, Rig, open_device
from loading.rounds import paired_rounds
from loading.table import all_tables, report_text
from machine import Machine
from timing import Quartiles

ROOT = Path(__file__).resolve().parents[2]


def at(value: float) -> Quartiles:
    return Quartiles(0.9 * value, value, 1.1 * value)


def bandwidth(block: int, share: float, first_us: float = 100.0, own_us: float = 80.0) -> Bandwidth:
    return Bandwidth(
        rounds=5,
        others_cores=0.0,
        device="host, link of 4.0 GB/s and 0 us (emulated)",
        emulated=True,
        latency_us=0.0,
        block_bytes=block,
        layers=10,
        layers_us=at(200 / share),
        baseline=LINK_TIME,
        copy_us=at(200),
        share=at(share),
        one_us=at(210),
        one_share=at(1.05 * share),
        first_us=at(first_us),
        own_us=at(own_us),
        late_us=at(first_us - own_us),
    )


def in_memory(block: int, share: float) -> Bandwidth:
    case = bandwidth(block, share)
    return replace(case, device="host", emulated=False, baseline=MEMCPY)


def prefill(excess: float, ratio: float | None = 0.5, transfer_ms: float = 1.0) -> Prefill:
    ms = {mode: at(20.0) for mode in ("cached", "warm", "layerwise", "async", "blocking")}
    return Prefill(
        *(5, 0.0, "host, link (emulated)", True, "a model", 16, 128, 10, 1000),
        ratio=ratio,
        transfer_ms=transfer_ms,
        ms=ms,
        excess={"cached": at(excess), "warm": at(excess)},
    )


def decode(ratio: float, p99: float) -> Decode:
    device = "host, link (emulated)"
    return Decode(5, 0.0, device, True, "a model", 16, "nobody", 4, 1.0, at(10), at(11), at(ratio),
                  quiet_p99_ms=20, loading_p99_ms=20 * p99)  # fmt: skip


def make_report() -> Report:
    return Report(
        command="python bench/loader.py",
        commit="abc",
        seed=1,
        seconds=2.0,
        others_cores=0.0,
        machine=Machine("cpu", 2, "avx512", 1 << 20, 1 << 30),
        device="host",
        cores="core 0 and core 1",
        memcpy_gb_s=10.0,
        shows_disturbed=False,
        absent=[],
        bandwidth=[bandwidth(MB, 0.96), bandwidth(MB // 2, 0.92), in_memory(MB, 0.96)],
        overhead=[Overhead(5, 0.0, "by the host", 512, at(0.5), at(1.5))],
        concurrent=[],
        prefill=[prefill(1.02)],
        decode=[decode(1.01, 1.2)],
    )


def verdicts(report: Report) -> list[str]:
    return [bar.verdict for bar in bars.all_bars(report)]


def test_bars_are_those_of_the_cases():
    met = ["met"] * 8
    assert verdicts(make_report()) == [*met, "missed by 14.3% in 1 of 1"]
    # 20 us a block: the bar is 20 / 22.
    assert bars.least_share(bandwidth(MB // 2, 0.92)) == pytest.approx(20 / 22)
    assert bars.least_share(bandwidth(MB, 0.92)) == 0.95


@pytest.mark.parametrize(
    "number, changed",
    [
        (0, {"bandwidth": [bandwidth(MB, 0.96), bandwidth(2 * MB, 0.94)]}),
        (1, {"bandwidth": [bandwidth(MB // 2, 0.90)]}),
        (2, {"bandwidth": [bandwidth(MB, 0.96), in_memory(MB // 2, 0.90), in_memory(MB, 0.96)]}),
        (3, {"bandwidth": [bandwidth(MB, 0.96, first_us=116.1)]}),
        (4, {"overhead": [Overhead(5, 0.0, "by the host", 512, at(0.5), at(2.1))]}),
        (5, {"prefill": [prefill(1.04), prefill(1.0)]}),
        (6, {"prefill": [prefill(1.04)]}),
        (7, {"decode": [decode(1.06, 1.0)]}),
    ],
)
def test_a_bar_is_missed_by_its_worst_case(number: int, changed: dict):
    bar = bars.all_bars(replace(make_report(), **changed))[number]
    assert bar.verdict.startswith("missed by ")
    assert len(bar.missed) == 1 and bar.worst is bar.missed[0]


def test_memory_without_a_link_is_judged_apart():
    report = replace(make_report(), bandwidth=[bandwidth(MB, 0.96), in_memory(MB, 0.5)])
    large, small, memory = bars.all_bars(report)[:3]
    assert (large.verdict, small.verdict) == ("met", "not measured")
    assert memory.verdict == "missed by 47.4% in 1 of 1"


def test_a_copy_takes_what_its_emulated_link_says():
    assert Link(4e9, 1e-5).seconds(4_000_000) == pytest.approx(1.01e-3)
    with pytest.raises(ValueError, match="link: expected an emulated one, got none"):
        Link().seconds(1)


def test_a_disturbed_case_meets_and_misses_nothing():
    slow = replace(bandwidth(MB, 0.5), others_cores=0.5)
    unknown = replace(slow, others_cores=float("nan"))
    report = replace(make_report(), bandwidth=[slow, unknown])
    bar = bars.all_bars(report)[0]
    assert (bar.verdict, bar.disturbed) == ("not measured", 2)
    assert all("-" in cell for row in all_tables(report)[1].rows for cell in row[1:])
    shown = bars.all_bars(replace(report, shows_disturbed=True))[0]
    assert shown.verdict == "missed by 47.4% in 2 of 2"


def test_a_real_link_that_is_slower_than_compute_promises_nothing():
    slow = prefill(1.5, ratio=None, transfer_ms=3.0)
    assert slow.measured_ratio == pytest.approx(1.5)
    bar = bars.all_bars(replace(make_report(), prefill=[slow]))[5]
    assert bar.verdict == "not measured"


def test_a_report_survives_its_file_and_says_what_is_emulated(tmp_path: Path):
    report = make_report()
    save(report, tmp_path / "loader.json")
    assert verdicts(load(tmp_path / "loader.json")) == verdicts(report)
    assert load(tmp_path / "loader.json").prefill == report.prefill
    assert "link of 4.0 GB/s and 0 us (emulated)" in report_text(report)


def test_the_section_between_the_marks_is_replaced(tmp_path: Path):
    path = tmp_path / "benchmarks.md"
    path.write_text(f"before\n{section.BEGIN}\nSTALE\n{section.END}\nafter\n")
    for _ in range(2):
        section.write_section(make_report(), path)
        text = path.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "STALE" not in text
        assert text.count("### Bars") == 1
    path.write_text("nothing")
    with pytest.raises(ValueError, match="benchmarks.md: expected one line"):
        section.write_section(make_report(), path)
    marks = (ROOT / "docs/benchmarks.md").read_text()
    assert marks.count(section.BEGIN) == marks.count(section.END) == 1


def test_rounds_alternate():
    order: list[str] = []
    jobs = {name: lambda name=name: order.append(name) for name in "ab"}
    results = paired_rounds(jobs, least=3)
    assert "".join(order) == "ab" + "abbaab"
    assert {name: len(values) for name, values in results.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("link", [Link(), Link(1e9)])
def test_every_load_is_cold(link: Link):
    rig = Rig(open_device("host", link, Cores(0, 0)), Cores(0, 0), 2, 4096, images=3, room=2)
    for _ in range(5):
        times = rig.load()
        assert 0 < times.first <= times.total
    stats = rig.loader.stats()
    assert (stats.loads, stats.bytes) == (5, 5 * rig.bytes)


def test_the_overhead_is_measured(tmp_path: Path):
    """By the rule of `make bench`, whose other targets stay as they are."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-s", str(overhead.LIBRARY)]
    subprocess.run(command, cwd=ROOT, env=variables, check=True)
    cases = overhead.measure_overhead(overhead.load_library(ROOT), 64, 5, Cores(0, 0))
    assert [case.waits for case in cases] == list(overhead.WAITS)
    # More than nothing, and far from what a copy of its own would cost.
    assert all(0 < case.cpu_us.median < 100 for case in cases)
    with pytest.raises(FileNotFoundError, match="`make bench` builds it"):
        overhead.load_library(tmp_path)


def test_sizes_are_named():
    assert [size(nbytes) for nbytes in (16384, MB, 16 * MB)] == ["16 KB", "1 MB", "16 MB"]


def test_all_of_it_once(tmp_path: Path):
    """In a process of its own: it pins threads and sets torch's number of them."""
    done = subprocess.run(
        [sys.executable, "bench/loader.py", "--tiny", "--out", tmp_path, "--seed", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = load(tmp_path / "loader.json")
    assert report.seed == 5
    assert [case.emulated for case in report.bandwidth] == [False, True]
    memory, linked = report.bandwidth
    assert (memory.baseline, linked.baseline) == (MEMCPY, LINK_TIME)
    own_us = 10 + linked.block_bytes * linked.layers / 1e3  # TINY's link
    assert linked.copy_us.low == linked.copy_us.high == pytest.approx(own_us, rel=1e-4)
    assert 0 < linked.share.high <= 1  # no load is faster than its link
    assert linked.share.median == pytest.approx(own_us / linked.layers_us.median, rel=1e-3)
    assert [case.loads for case in report.concurrent] == [1, 2]
    assert len(report.prefill) == 1 and len(report.decode) == 2
    assert all(case.rounds >= 2 for case in report.cases())
    assert "Bars" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path):
    with pytest.raises(SystemExit, match="no GPU: "):
        command.main(["--device", "cuda", "--out", str(tmp_path)])


def test_a_report_shows_a_full_run_only(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["--report", "--quick"])
    assert "--report: expected no other option" in capsys.readouterr().err
