# SPDX-License-Identifier: Apache-2.0
"""What a core needs: between the points, in a file, and from the operators of this machine."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from toppings import cpu
from toppings.calibration import CpuCalibration, CpuPoint, calibrate_cpu, check_output
from toppings.errors import InvalidArgumentError

RANKS, WIDTHS, TOKENS = (8, 16, 64), (64, 128, 512), (1, 16, 256)


def made_of(us: Callable[[int, int, int], float]) -> CpuCalibration:
    """Of a machine whose call takes us(tokens, rank, k + n)."""
    points = []
    for width, rank, tokens in product(WIDTHS, RANKS, TOKENS):
        time = us(tokens, rank, 2 * width)
        points.append(CpuPoint(tokens, rank, width, width, time, 0.9 * time, 1.1 * time))
    return CpuCalibration(
        cpu="a CPU",
        level="generic",
        dtype="bfloat16",
        toppings="0.1.0",
        torch="2.13.0",
        date="2026-11-24T12:00:00+00:00",
        pool_bytes=96 << 20,
        samples=300,
        points=tuple(points),
    )


def plausible(tokens: int, rank: int, width: int) -> float:
    """A fixed part, reading the weights, the products."""
    return 1 + rank * width * (1e-4 + 2e-5 * tokens)


def test_figures_of_a_point() -> None:
    point = CpuPoint(tokens=16, rank=8, k=64, n=64, us=4.0, us_low=3.0, us_high=5.0)
    assert point.us_per_token == 0.25
    assert point.tokens_per_second == 4e6
    assert point.spread == 0.5 and point.noisy


def test_measured_points_are_returned_as_they_are() -> None:
    calibration = made_of(plausible)
    for point in calibration.points:
        seconds = calibration.seconds(point.tokens, point.rank, point.k, point.n)
        assert seconds == pytest.approx(point.us / 1e6)


@pytest.mark.parametrize(
    ("tokens", "rank", "k", "n"),
    [(1, 8, 64, 64), (2, 9, 65, 64), (16, 32, 512, 128), (100, 63, 128, 512), (255, 12, 300, 7)],
)
def test_linear_between_points(tokens: int, rank: int, k: int, n: int) -> None:
    seconds = made_of(plausible).seconds(tokens, rank, k, n)
    assert seconds == pytest.approx(plausible(tokens, rank, k + n) / 1e6)


def test_below_the_smallest_is_an_upper_bound() -> None:
    calibration = made_of(plausible)
    smallest = calibration.seconds(16, 8, 64, 64)
    assert calibration.seconds(16, 1, 64, 64) == smallest
    assert calibration.seconds(16, 8, 1, 1) == smallest
    pieces = replace(calibration, points=tuple(p for p in calibration.points if p.tokens != 1))
    assert pieces.seconds(3, 8, 64, 64) == smallest


def test_above_the_largest_is_in_proportion() -> None:
    calibration = made_of(plausible)
    largest = calibration.seconds(256, 64, 512, 512)
    assert calibration.seconds(25600, 64, 512, 512) == pytest.approx(100 * largest)
    assert calibration.seconds(256, 128, 512, 512) == pytest.approx(2 * largest)
    assert calibration.seconds(256, 64, 1024, 2048) == pytest.approx(3 * largest)


def test_far_above_the_largest_is_refused() -> None:
    calibration = made_of(plausible)
    assert calibration.seconds(1, 256, 2048, 2048) > 0
    with pytest.raises(InvalidArgumentError, match="rank: expected at most 256.*got 257"):
        calibration.seconds(1, 257, 64, 64)
    with pytest.raises(InvalidArgumentError, match=r"k \+ n: expected at most 4096.*got 4097"):
        calibration.seconds(1, 8, 4096, 1)


def test_never_less_for_more() -> None:
    calibration = made_of(plausible)
    for sizes in (
        [calibration.seconds(tokens, 12, 100, 90) for tokens in range(600)],
        [calibration.seconds(20, rank, 100, 90) for rank in range(257)],
        [calibration.seconds(20, 12, 1, n) for n in range(1, 4096, 7)],
    ):
        assert all(less <= more for less, more in pairwise(sizes))


def test_nothing_to_compute_takes_no_time() -> None:
    calibration = made_of(plausible)
    assert calibration.seconds(0, 8, 64, 64) == calibration.seconds(16, 0, 64, 64) == 0
    assert calibration.tokens_per_second(16, 0, 64, 64) == math.inf
    assert calibration.tokens_per_second(16, 8, 64, 64) == pytest.approx(
        16e6 / plausible(16, 8, 128)
    )


@pytest.mark.parametrize("sizes", [(-1, 8, 64, 64), (1, -1, 64, 64), (1, 8, 0, 64), (1, 8, 64, 0)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="tokens, rank, k, n"):
        made_of(plausible).seconds(*sizes)


def test_points_are_a_full_grid() -> None:
    calibration = made_of(plausible)
    for points in (calibration.points[1:], calibration.points + calibration.points[:1], ()):
        with pytest.raises(InvalidArgumentError, match="points: expected every combination"):
            replace(calibration, points=points)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    calibration = made_of(plausible)
    calibration.save(path)
    assert CpuCalibration.load(path) == calibration
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]
    first = json.loads(path.read_text())["points"][0]
    assert first["tokens_per_second"] == calibration.points[0].tokens_per_second
    assert first["us_per_token"] == calibration.points[0].us_per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "format"),
        ({"version": 2}, "version: expected 1, got 2"),
        ({"version": None}, "version: expected 1, got None"),
        ({"cpu": 3}, "cpu: expected str, got 3"),
        ({"level": None}, "level: expected str, got None"),
        ({"samples": "many"}, "samples: expected int, got 'many'"),
        ({"samples": True}, "samples: expected int, got True"),
        ({"points": {}}, "points: expected an array"),
        ({"points": []}, "points: expected every combination"),
        ({"points": [3]}, "points: expected objects, got 3"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "cpu.json"
    made_of(plausible).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidArgumentError, match="calibration: ") as raised:
        CpuCalibration.load(path)
    text = str(raised.value)
    assert message in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank: expected a positive integer, got 0"),
        ({"k": 64.0}, "k: expected int, got 64.0"),
        ({"us": float("nan")}, "us_low, us, us_high"),
        ({"us_high": float("inf")}, "us_low, us, us_high"),
        ({"us_low": -1}, "us_low, us, us_high"),
        ({"us_low": 1e9}, "us_low, us, us_high"),
        ({"us": None}, "us: expected float, got None"),
        ({"rank": 9}, "points: expected every combination"),
    ],
)
def test_a_wrong_point_is_one_line(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "cpu.json"
    made_of(plausible).save(path)
    content = json.loads(path.read_text())
    content["points"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidArgumentError) as raised:
        CpuCalibration.load(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b"[]", b"3"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "cpu.json"
    path.write_bytes(data)
    with pytest.raises(InvalidArgumentError, match="calibration: expected"):
        CpuCalibration.load(path)
    with pytest.raises(InvalidArgumentError, match="output: expected"):
        made_of(plausible).save(path)
    assert path.read_bytes() == data


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="No such file"):
        CpuCalibration.load(tmp_path / "cpu.json")
    with pytest.raises(InvalidArgumentError, match="folder"):
        made_of(plausible).save(tmp_path / "none" / "cpu.json")
    with pytest.raises(InvalidArgumentError, match="something else"):
        check_output(tmp_path)


def test_a_calibration_of_another_version_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert not check_output(path)
    path.write_text('{"format": "toppings-cpu-calibration", "version": 99}')
    assert check_output(path)
    made_of(plausible).save(path)
    assert CpuCalibration.load(path) == made_of(plausible)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_this_machine(two_threads: None, dtype: str, tmp_path: Path) -> None:
    result = calibrate_cpu(dtype, (32, 4), (64, 1024), (64, 1), rounds=range(5))
    assert torch.get_num_threads() == 2
    assert (result.level, result.dtype, result.samples) == (cpu.level(), dtype, 5)
    sizes = [(p.k, p.n, p.rank, p.tokens) for p in result.points]
    assert sizes == [(w, w, r, t) for w in (64, 1024) for r in (4, 32) for t in (1, 64)]
    # 8192 times the work: even on a busy machine this takes longer.
    assert result.seconds(64, 32, 1024, 1024) > result.seconds(1, 4, 64, 64)
    result.save(tmp_path / "cpu.json")
    assert CpuCalibration.load(tmp_path / "cpu.json") == result


def test_one_thread_meanwhile_and_the_former_number_after_an_error(two_threads: None) -> None:
    seen = []

    def rounds() -> Iterator[None]:
        seen.append(torch.get_num_threads())
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_cpu("bfloat16", [4], [64], [1], rounds())
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of bfloat16, float16, float32, got 'int8'"),
        ({"ranks": []}, "ranks: expected one or more"),
        ({"ranks": [8, 8]}, "ranks: expected one or more, each once"),
        ({"widths": [0]}, "widths: expected a positive integer, got 0"),
        ({"tokens": [1.5]}, "tokens: expected a positive integer, got 1.5"),
        ({"widths": [1 << 40]}, "at most half of the memory"),
        ({"rounds": range(1)}, "rounds: expected at least 2, got 1"),
    ],
)
def test_impossible_calibrations_are_refused(
    two_threads: None, arguments: dict, message: str
) -> None:
    small = {"ranks": [4], "widths": [64], "tokens": [1], "rounds": range(2)}
    with pytest.raises(InvalidArgumentError, match=message):
        calibrate_cpu(**(small | arguments))
    assert torch.get_num_threads() == 2
