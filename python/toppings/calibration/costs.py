# SPDX-License-Identifier: Apache-2.0
"""What one core needs for LoRA products: the measured points, as a file and as an answer."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from toppings.errors import InvalidArgumentError

__all__ = ["CpuCalibration", "CpuPoint", "check_output", "check_positive"]

_FORMAT = "toppings-cpu-calibration"
_VERSION = 1
_FAR = 4  # how far beyond the largest rank and width measured a question may lie
_NOISY = 0.2


@dataclass(frozen=True)
class CpuPoint:
    """One size of call and its time on one core: the median over all samples, and quartiles."""

    tokens: int
    rank: int
    k: int
    n: int
    us: float  # a call
    us_low: float
    us_high: float

    def __post_init__(self) -> None:
        for name in ("tokens", "rank", "k", "n"):
            check_positive(getattr(self, name), name)
        if not 0 < self.us_low <= self.us <= self.us_high < math.inf:
            raise InvalidArgumentError(
                "us_low, us, us_high: expected positive finite numbers in rising order, "
                f"got {self.us_low}, {self.us}, {self.us_high}"
            )

    @property
    def us_per_token(self) -> float:
        return self.us / self.tokens

    @property
    def tokens_per_second(self) -> float:
        """Of one core; times the seconds it may take, this is the paper's c, tokens per core."""
        return 1e6 * self.tokens / self.us

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.us_high - self.us_low) / self.us

    @property
    def noisy(self) -> bool:
        return self.spread > _NOISY


@dataclass(frozen=True)
class CpuCalibration:
    """The points of a grid, tokens × rank × (K + N), on one machine, and what lies between them.

    Raises InvalidArgumentError for points that are no full grid.
    """

    cpu: str  # its model
    level: str  # as toppings.cpu.level()
    dtype: str  # of x, y and weights
    toppings: str
    torch: str
    date: str  # ISO 8601, UTC
    pool_bytes: int  # of the weights that the calls went through
    samples: int  # of every point
    points: tuple[CpuPoint, ...]

    def __post_init__(self) -> None:
        expected = math.prod(map(len, self._axes))
        if not len(self.points) == len(self._grid) == expected != 0:
            raise InvalidArgumentError(
                "points: expected every combination of tokens, rank and k + n once "
                f"({expected} of them), got {len(self.points)}, {len(self._grid)} of them different"
            )

    @cached_property
    def _grid(self) -> dict[tuple[int, ...], float]:
        return {(p.tokens, p.rank, p.k + p.n): p.us / 1e6 for p in self.points}

    @cached_property
    def _axes(self) -> list[list[int]]:
        return [sorted({key[axis] for key in self._grid}) for axis in range(3)]

    def seconds(self, tokens: int, rank: int, k: int, n: int) -> float:
        """Seconds that one core needs for one projection; 0 for no tokens or rank 0 (absent).

        Between measured points: linear in tokens, in rank and in rank × (K + N), which the work is
        proportional to. Below the smallest measured value of one of them: as for that value, an
        upper bound. Above the largest: in proportion to it. That holds for any number of tokens,
        which can be computed in pieces; rank and K + N may go to four times the largest measured.

        A layer costs the sum over its projections. Raises InvalidArgumentError for sizes below
        zero (k, n: one) or too far above what was measured.
        """
        if tokens < 0 or rank < 0 or k < 1 or n < 1:
            raise InvalidArgumentError(
                "tokens, rank, k, n: expected at least 0, 0, 1 and 1, "
                f"got {tokens}, {rank}, {k} and {n}"
            )
        if tokens == 0 or rank == 0:
            return 0.0
        at = (tokens, rank, k + n)
        for name, value, axis in zip(("rank", "k + n"), at[1:], self._axes[1:], strict=True):
            if value > _FAR * axis[-1]:
                raise InvalidArgumentError(
                    f"{name}: expected at most {_FAR * axis[-1]}, {_FAR} times the largest "
                    f"calibrated, got {value}"
                )
        corners = product(*(_around(v, axis) for v, axis in zip(at, self._axes, strict=True)))
        return sum(
            self._grid[tuple(key for key, _ in corner)] * math.prod(weight for _, weight in corner)
            for corner in corners
        )

    def tokens_per_second(self, tokens: int, rank: int, k: int, n: int) -> float:
        """tokens / seconds(tokens, rank, k, n), of one core; infinite for rank 0.

        Raises InvalidArgumentError as :meth:`seconds`, and for no tokens.
        """
        check_positive(tokens, "tokens")
        seconds = self.seconds(tokens, rank, k, n)
        return tokens / seconds if seconds > 0 else math.inf

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, in place of an older calibration there, as a whole or not at all.

        `us_per_token` and `tokens_per_second` stand beside each point for other readers.
        Raises InvalidArgumentError for a path that :func:`check_output` refuses or that can't be
        written.
        """
        check_output(path)
        path = Path(path)
        content = {"format": _FORMAT, "version": _VERSION} | asdict(self)
        content["points"] = [
            asdict(p) | {"us_per_token": p.us_per_token, "tokens_per_second": p.tokens_per_second}
            for p in self.points
        ]
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            try:
                part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise InvalidArgumentError(
                f"output: expected a file that can be written, got '{error.strerror}' ({path})"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CpuCalibration:
        """What :meth:`save` wrote. Fields that are not known here are ignored.

        Raises InvalidArgumentError for a file that is missing, no calibration, of another version,
        or has a missing or impossible field.
        """
        try:
            content = _read_object(Path(path))
            if content.get("version") != _VERSION:
                raise InvalidArgumentError(
                    f"version: expected {_VERSION}, got {content.get('version')!r:.40}"
                )
            points = content.get("points")
            if not isinstance(points, list):
                raise InvalidArgumentError(f"points: expected an array, got {points!r:.40}")
            kept = tuple(CpuPoint(**_known_fields(CpuPoint, point)) for point in points)
            return cls(**_known_fields(cls, content | {"points": kept}))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"calibration: {error} ({path})") from error


def check_output(path: str | os.PathLike[str]) -> bool:
    """Whether a calibration, of any version, is in the way at `path` (it may be replaced).

    Raises InvalidArgumentError where another kind of file is, or no folder that can be written.
    """
    path = Path(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidArgumentError(
            f"output: expected a file in a folder that can be written, got {path}"
        )
    if not os.path.lexists(path):
        return False
    try:
        _read_object(path)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"output: expected no file or an older calibration, got something else ({path})"
        ) from error
    return True


def _around(value: int, axis: list[int]) -> list[tuple[int, float]]:
    """The axis' neighbours of a value, each with its weight in the value's time."""
    if value <= axis[0]:
        return [(axis[0], 1.0)]
    if value >= axis[-1]:
        return [(axis[-1], value / axis[-1])]
    above = bisect_right(axis, value)
    low, high = axis[above - 1], axis[above]
    part = (value - low) / (high - low)
    return [(low, 1 - part), (high, part)]


def check_positive(value: int, name: str) -> None:
    if type(value) is not int or value < 1:
        raise InvalidArgumentError(f"{name}: expected a positive integer, got {value!r:.40}")


def _read_object(path: Path) -> dict[str, object]:
    """The JSON of a calibration, of any version."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidArgumentError(f"expected a file, got '{error.strerror}'") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("expected JSON, got something else") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InvalidArgumentError(f"expected a JSON object of format {_FORMAT!r}, got another")
    return content


# The annotations of the two dataclasses, which are strings, and what JSON may hold for them.
_JSON_TYPES = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "tuple[CpuPoint, ...]": (tuple,),
}


def _known_fields(cls: type[CpuPoint] | type[CpuCalibration], content: object) -> dict[str, Any]:
    """The fields of `cls`, each of its type."""
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"points: expected objects, got {content!r:.40}")
    for field in fields(cls):
        if type(content.get(field.name)) not in _JSON_TYPES[str(field.type)]:
            raise InvalidArgumentError(
                f"{field.name}: expected {field.type}, got {content.get(field.name)!r:.40}"
            )
    return {field.name: content[field.name] for field in fields(cls)}
