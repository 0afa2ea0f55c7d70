# SPDX-License-Identifier: Apache-2.0
"""Checks of the types of arguments that the runtime takes as C++ numbers."""

import operator
from numbers import Real

from toppings.errors import InvalidArgumentError

__all__ = ["check_int", "check_number"]


def check_number(what: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InvalidArgumentError(f"{what}: expected a number, got {value!r}")


def check_int(what: str, value: object, bits: int = 32) -> None:
    """bits: of the signed integer that it becomes. Narrower ranges are checked by its users."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidArgumentError(f"{what}: expected an integer, got {value!r}") from None
    most = 2 ** (bits - 1) - 1
    if not -most <= number <= most:
        raise InvalidArgumentError(f"{what}: expected an integer up to {most}, got {value}")
