# SPDX-License-Identifier: Apache-2.0
"""Every peer that is installed computes the case, and the numbers are put together right."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case
from inputs import Inputs, Pool
from machine import Machine
from measure import measure
from peaks import Peaks
from peers import Absent, find_peers
from results import READ, Report, Result, load, save
from section import BEGIN, END, write_section
from timing import Job, Quartiles, Timing, summarize, time_rounds

ROOT = Path(__file__).resolve().parents[2]
QUARTILES = Quartiles(1.0, 2.0, 3.0)


def make_case(popularity: str, ranks: tuple[int, ...] = (8,), dtype: str = "bf16") -> Case:
    return Case("decode", 24, ranks, 128, 192, popularity, 24, True, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("popularity", ["identical", "equal", "distinct", "uniform", "zipf"])
def test_every_peer_agrees_with_the_reference(popularity: str, dtype: str):
    case = make_case(popularity, (8, 16, 4), dtype)
    peers, _ = find_peers(ROOT)
    with torch.inference_mode():
        result = measure(case, Pool(case, 48, seed=1), peers, seed=2, seconds=0)
    assert set(result.times) == {peer.name for peer in peers if peer.supports(case)}
    assert result.times["toppings"].ratio.median == 1


def test_peers_that_are_not_installed_say_how_to_get_them(tmp_path: Path):
    peers, absent = find_peers(tmp_path)
    assert [peer.name for peer in absent] == ["vLLM", "oneDNN", "libxsmm"]
    assert all("make bench-peers" in peer.reason for peer in absent)
    assert peers[0].name == "toppings"


def test_a_wrong_peer_is_found():
    class Wrong:
        name, version, sorted = "wrong", "0", False

        def supports(self, case: Case) -> bool:
            return True

        def prepare(self, inputs: Inputs):
            return lambda call: inputs.y.mul_(1.1)

    case = make_case("distinct")
    peers, _ = find_peers(ROOT)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="wrong: expected an error"):
        measure(case, Pool(case, 48, seed=1), [peers[0], Wrong()], seed=2, seconds=0)


def test_bytes_and_flops_count_the_adapters_in_use():
    case = make_case("identical", (8, 16, 4))
    inputs = Inputs(case, Pool(case, 48, seed=1), seed=2)
    assert inputs.weight_bytes == 8 * (128 + 192) * 2
    assert inputs.flops == 2 * 24 * 8 * (128 + 192)
    assert sorted(inputs.sequence) == [0, 1]


def test_every_call_takes_the_next_weights_and_the_baseline_every_round():
    taken = []
    jobs = {name: Job(taken.append, lambda: None) for name in ("a", "b")}
    times = time_rounds(jobs, "a", sets=[0, 2, 1], seconds=0)
    assert taken[:7] == [0, 2, 1, 0, 2, 1, 0]
    assert list(times["a"]) == list(range(21))
    assert {0} <= set(times["b"]) <= set(times["a"])


def test_ratios_pair_the_times_of_a_round():
    summary = summarize({"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {0: 3.0, 2: 4.0}}, "a")
    assert summary["b"].rounds == 2
    assert summary["b"].ratio.median == 2
    assert summary["a"].ratio == Quartiles(1, 1, 1)


def make_report(case: Case) -> Report:
    times = {
        "toppings": Timing(5, QUARTILES, QUARTILES),
        "torch loop": Timing(5, QUARTILES, QUARTILES),
        READ: Timing(5, QUARTILES, Quartiles(0.8, 0.9, 1.0)),
    }
    result = Result(case, 2, 1000, 4000, {"toppings": 0.001}, 0.01, times)
    peaks = [Peaks(1, 100.0, 200.0, 30.0)]
    return Report(
        *("python bench/ops.py", "abc", 1, 2.0, 0.0),
        versions={"toppings": "1", "torch loop": "2"},
        absent=[Absent("vLLM", "because")],
        machine=Machine("cpu", 2, "avx512", 1 << 20, 1 << 30),
        peaks_before=peaks,
        peaks_after=[replace(peaks[0], read_gb_s=40.0)],
        results=[result],
    )


def test_a_report_survives_its_file(tmp_path: Path):
    report = make_report(make_case("distinct", (8, 16, 4)))
    save(report, tmp_path / "ops.json")
    assert load(tmp_path / "ops.json") == report


def test_share_of_peak_is_of_what_limits_the_call():
    report = make_report(make_case("distinct"))
    result, peaks = report.results[0], report.peaks(1)
    assert peaks.read_gb_s == 40  # the better of both
    assert result.bound(peaks) == "memory"
    assert result.share(peaks) == 0.9
    warm = replace(result, case=replace(result.case, cold=False))
    assert warm.bound(peaks) == "compute"
    assert warm.share(peaks) == pytest.approx(4000 / 2 / 1e3 / 200)


def test_the_section_between_the_marks_is_replaced(tmp_path: Path):
    path = tmp_path / "benchmarks.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    report = make_report(make_case("distinct"))
    write_section(report, path)
    once = path.read_text()
    write_section(report, path)
    assert path.read_text() == once
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert "absent" in once
    path.write_text("nothing")
    with pytest.raises(ValueError, match="benchmarks.md: expected one line"):
        write_section(report, path)
