# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark without a GPU: its grid, its model, its peers' metadata, its report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu import command
from gpu.cases import MIXED, SITES, Case, Site, make_cases, tiny_cases
from gpu.clock import HostClock
from gpu.inputs import MAX_CALLS, Inputs, call_count
from gpu.measure import measure, skipped, time_rounds
from gpu.model import roofline_us, tokens_per_adapter, work_of
from gpu.peaks import Peaks
from gpu.peers import find_peers
from gpu.peers.interface import Absent, one_line
from gpu.results import MODES, load
from gpu.table import failure_lines

CPU = torch.device("cpu")
SITE = Site("tiny", "qkv", 64, (64, 32, 32))
CASE = Case("decode", SITE, 12, 5, (8, 16))


def test_the_grid_has_every_shape_that_was_promised():
    cases = make_cases()
    assert len(cases) == len(set(cases)) < 160
    whole = {(c.phase, c.tokens, c.adapters, c.ranks) for c in cases if c.site == SITES[0]}
    for tokens in (1, 8, 16, 32, 64):
        for adapters in {1, min(8, tokens), tokens}:
            for ranks in ((8,), (16,), (64,), *([MIXED] if adapters > 1 else [])):
                assert ("decode", tokens, adapters, ranks) in whole
    for tokens in (512, 2048, 8192):
        for segments in (1, 4, 64):
            assert ("prefill", tokens, segments, (16,)) in whole
    for site in SITES:
        assert sum(case.site == site for case in cases) >= 11
    assert set(cases) < set(make_cases(full=True))
    first = len({case.site for case in cases[:88]})
    assert first == len(SITES), "every site comes before the rest of the first one"


def test_widths_are_those_of_the_models():
    sizes = {(site.model, site.name): (site.width_in, sum(site.widths)) for site in SITES}
    assert sizes["8B", "qkv"] == (4096, 6144) and sizes["8B", "gate_up"] == (4096, 28672)
    assert sizes["70B/8", "qkv"] == (8192, 1280) and sizes["70B/8", "down"] == (3584, 8192)


def test_more_adapters_than_tokens_are_refused():
    with pytest.raises(ValueError, match="adapters: expected 1 to 4, got 5"):
        Case("decode", SITE, 4, 5, (8,))


def test_work_counts_what_the_traffic_model_says():
    work = work_of(CASE)
    rows = 8 + 16 + 8 + 16 + 8
    row = 3 * 64 + 128
    assert work.weight_bytes == rows * row * 2
    assert work.bytes - work.weight_bytes == 12 * (64 + 2 * 128) * 2
    ranks = sum(r * t for r, t in zip((8, 16, 8, 16, 8), tokens_per_adapter(CASE), strict=True))
    assert work.flops == 2 * ranks * row
    assert sum(tokens_per_adapter(CASE)) == 12


def test_roofline_is_the_slower_of_memory_and_arithmetic():
    work = work_of(CASE)
    assert roofline_us(work, 1.0, 1e9) == pytest.approx(work.bytes / 1e3)
    assert roofline_us(work, 1e9, 1.0) == pytest.approx(work.flops / 1e6)


def test_the_best_of_two_runs_is_the_highest_rate_and_the_shortest_launch():
    assert Peaks(1, 4, 5, 2, 8).best(Peaks(2, 3, 6, 3, 7)) == Peaks(2, 4, 6, 2, 7)


def test_facts_of_the_8b_model():
    """64 distinct adapters of rank 16, q, k, v: 13 µs at 3 TB/s, as docs/kernels.md says."""
    work = work_of(Case("decode", SITES[0], 64, 64, (16,)))
    assert roofline_us(work, 3000, 798) == pytest.approx(13.3, abs=0.5)


@pytest.mark.parametrize("case", [CASE, *tiny_cases()[:4]], ids=lambda case: case.label)
def test_inputs_are_what_the_operators_take(case: Case):
    inputs = Inputs(case, CPU, seed=1)
    assert 2 <= inputs.calls <= MAX_CALLS and inputs.calls == call_count(case)
    slots = torch.cat([inputs.operator_arguments(call)[4] for call in range(inputs.calls)], dim=1)
    assert slots.shape == (len(case.site.widths), inputs.calls * case.adapters, 3)
    offsets = slots[:, :, :2].flatten()
    assert len(offsets.unique()) == len(offsets)  # no two calls share weights
    counts = torch.bincount(inputs.token_slots.long(), minlength=case.adapters)
    assert counts.tolist() == inputs.lengths
    assert torch.equal(inputs.x_sorted[0], inputs.x[0][inputs.order])
    for s, width in enumerate(case.site.widths):
        assert inputs.stacked_b[s].shape[-1] == width
        assert torch.equal(inputs.stacked_a[s][1, 0, : case.ranks[0]], inputs.a(1, s, 0))


def test_every_peer_here_is_right_and_timed():
    peers, _ = find_peers()
    with torch.inference_mode():
        result = measure(CASE, peers, HostClock(), CPU, seed=3, seconds=0)
    names = {peer.name for peer in peers if peer.supports(CASE)}
    assert set(result.errors) == names >= {"toppings", "torch loop", "gather + bmm", "grouped_mm"}
    assert not result.failures
    assert all(set(result.times[mode]) == names for mode in MODES)
    assert result.ratio("graph", "toppings") == 1


class Broken:
    name, version, sorted = "broken", "0", False

    def __init__(self, run) -> None:
        self._run = run

    def supports(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs):
        return lambda call: self._run(inputs, call)


def test_a_peer_that_fails_or_is_wrong_is_left_out_and_named():
    def wrong(inputs: Inputs, call: int) -> None:
        inputs.y[call].mul_(1.5)

    def raises(inputs: Inputs, call: int) -> None:
        raise RuntimeError("no such\n   kernel")

    peers = [find_peers()[0][0], Broken(wrong), Broken(raises)]
    with torch.inference_mode():
        result = measure(CASE, peers, HostClock(), CPU, seed=3, seconds=0)
    assert set(result.errors) == {"toppings"}
    reasons = [failure.reason for failure in result.failures]
    assert reasons[0].startswith("error ") and reasons[1] == "RuntimeError: no such kernel"


def test_an_absent_peer_says_why_in_one_line():
    _, absent = find_peers()
    for peer in absent:
        assert peer.reason and "\n" not in peer.reason
    assert one_line(ValueError("a\n b")) == "ValueError: a b"
    assert len(one_line(ValueError("x" * 500))) == 160


def test_rounds_alternate_and_slow_ones_sit_out():
    order = []

    class Clock(HostClock):
        def time(self, run):
            order.append(run())
            return {"a": 1.0, "b": 30.0}[order[-1]]

    times = time_rounds({"toppings": lambda: "a", "slow": lambda: "b"}, Clock(), seconds=0)
    assert order[:6] == ["a", "b", "a", "b", "b", "a"]
    assert list(times["toppings"]) == list(range(7))
    assert set(times["slow"]) < set(times["toppings"])
    assert [skipped(ratio) for ratio in (0.5, 7, 17, 1000)] == [1, 1, 2, 8]


def test_the_rehearsal_runs_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--rehearse", "--out", str(tmp_path), "--only", "r=8-32", "--commit", "abc"]
    assert command.main([*arguments, "--seed", "5"]) == 0
    report = load(tmp_path / "ops.json")
    assert report.rehearsal and not report.failed and report.left_out == 0
    assert (report.commit, report.seed) == ("abc", 5)
    assert (tmp_path / "ops.png").stat().st_size > 0
    assert report.peaks.launch_us > 0 and report.peaks.graph_launch_us > 0
    output = capsys.readouterr().out
    assert "REHEARSAL" in output and "grouped_mm ×" in output
    assert f"empty kernel {report.peaks.launch_us:.1f} µs eager, " in output
    failing = replace(report.results[0], failures=[Absent("x", "because")])
    lines = failure_lines(replace(report, results=[failing, failing]))
    assert len(lines) == 1 and lines[0].startswith("x failed in 2 cases (")
    assert replace(report, stopped="error").failed
    assert replace(report, results=[]).failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(SystemExit, match="no GPU: "):
        command.main([])
