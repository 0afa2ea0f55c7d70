# SPDX-License-Identifier: Apache-2.0
"""Foreign bytes to Python values, strictly: whatever is wrong with them is one AdapterFormatError.

Messages never repeat the content of a file beyond the name or number at fault, escaped and clipped.
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeGuard

from toppings.errors import AdapterFormatError

# Python converts long integers in quadratic time; no number in these files needs more than 64 bits.
_MAX_DIGITS = 20
_MAX_SHOWN = 160


def shown(value: object) -> str:
    """``value`` as it may appear in a message: one line of ASCII, clipped; containers by kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; a pipe or a device is refused instead of blocking."""
    # Opening a FIFO blocks until someone writes, unless it is opened non-blocking.
    nonblock = getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | nonblock)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterFormatError(
                    f"{path.name}: expected a regular file, got another kind ({path})"
                )
            yield file
    except OSError as error:
        reason = error.strerror or "an I/O error"
        raise AdapterFormatError(
            f"{path.name}: expected a readable file, got {reason} ({path})"
        ) from None


def parse_object(data: bytes, what: str, where: str) -> dict[str, object]:
    """Parses one JSON object: UTF-8, no key twice at any level, no NaN or Infinity."""

    def failure(got: str) -> AdapterFormatError:
        return AdapterFormatError(f"{what}: expected a JSON object, got {got} ({where})")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise failure(f"the key {shown(twice)} twice")
        return table

    def integer(text: str) -> int:
        if len(text) > _MAX_DIGITS:
            raise failure(f"a number of {len(text)} digits")
        return int(text)

    def constant(name: str) -> NoReturn:
        raise failure(name)

    # Raised from None: json's own errors carry the whole document.
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise failure(f"bytes that are not UTF-8 at offset {error.start}") from None
    except json.JSONDecodeError as error:
        raise failure(f"invalid JSON at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise failure("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise failure(shown(value))
    return value


def is_int(value: object) -> TypeGuard[int]:
    """True for JSON integers only: Python counts true and false among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive_int(value: object, what: str, where: str) -> int:
    """``value`` as an integer in [1, 2**31)."""
    if not is_int(value) or not 0 < value < 2**31:
        raise AdapterFormatError(
            f"{what}: expected a positive integer, got {shown(value)} ({where})"
        )
    return value


def finite_number(value: object, what: str, where: str) -> float:
    """``value`` as a finite float; integers count."""
    if not (is_int(value) or isinstance(value, float)) or not math.isfinite(value):
        raise AdapterFormatError(f"{what}: expected a finite number, got {shown(value)} ({where})")
    return float(value)
