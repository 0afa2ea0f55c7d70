# SPDX-License-Identifier: Apache-2.0
"""PEFT's rules for matching module paths: suffix names, whole-path regexes, pattern tables, layers.

Regexes come from the adapter's author. They are compiled with Python's ``re``, never evaluated as
code, and bounded in length and number. ``re`` has no time limit: a hostile regex can still take
exponential time on a module path, so adapters of untrusted authors need a process that may be
killed.
"""

import re
from dataclasses import dataclass
from typing import Generic, TypeVar

from toppings.adapter.parsing import is_int, shown
from toppings.errors import AdapterFormatError

MAX_REGEX = 1024
MAX_ENTRIES = 65536

T = TypeVar("T")

# Without layers_pattern the first numbered segment that has two segments before it counts:
# in "model.layers.3.experts.0.w" that is 3.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def compile_regex(text: str, form: str, what: str, where: str) -> re.Pattern[str]:
    """Compiles ``form`` with ``{}`` replaced by ``text``; a bad or overlong regex is an error."""
    if len(text) > MAX_REGEX:
        raise AdapterFormatError(
            f"{what}: expected a regex of at most {MAX_REGEX} characters, got {len(text)} ({where})"
        )
    try:
        return re.compile(form.replace("{}", text))
    except (re.error, OverflowError, RecursionError) as error:
        reason = error.msg if isinstance(error, re.error) else "one too large"
        raise AdapterFormatError(
            f"{what}: expected a valid regex, got {shown(text)}: {reason} ({where})"
        ) from None


def name_list(value: object, what: str, where: str) -> tuple[str, ...]:
    """``value`` as a list of strings of bounded length."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterFormatError(
            f"{what}: expected a list of strings, got {shown(value)} ({where})"
        )
    if len(value) > MAX_ENTRIES:
        raise AdapterFormatError(
            f"{what}: expected at most {MAX_ENTRIES} names, got {len(value)} ({where})"
        )
    return tuple(value)


@dataclass(frozen=True)
class Selector:
    """A set of modules: ``suffixes`` (each with its leading dot), a ``regex``, or everything."""

    suffixes: tuple[str, ...] = ()
    regex: re.Pattern[str] | None = None
    everything: bool = False

    @classmethod
    def parse(cls, value: object, what: str, where: str) -> "Selector":
        """A list names modules by their last components; a string is a regex of the whole path."""
        if isinstance(value, str):
            return cls(regex=compile_regex(value, "{}", what, where))
        return cls(suffixes=tuple("." + name for name in name_list(value, what, where)))

    def matches(self, module: str) -> bool:
        if self.regex is not None:
            return self.regex.fullmatch(module) is not None
        # The dot in front makes a full path a suffix of itself.
        return self.everything or f".{module}".endswith(self.suffixes)

    def names(self, module: str) -> bool:
        """Whether the list has the full path of ``module``, not only its end."""
        return f".{module}" in self.suffixes


@dataclass(frozen=True)
class Overrides(Generic[T]):
    """``rank_pattern`` or ``alpha_pattern``: the first key, in file order, that matches decides.

    A key is a regex for the end of the module path, beginning at a dot or at its start.
    """

    entries: tuple[tuple[re.Pattern[str], T], ...] = ()

    @classmethod
    def parse(cls, table: dict[str, T], what: str, where: str) -> "Overrides[T]":
        if len(table) > MAX_ENTRIES:
            raise AdapterFormatError(
                f"{what}: expected at most {MAX_ENTRIES} keys, got {len(table)} ({where})"
            )
        return cls(
            tuple(
                (compile_regex(key, r"(.*\.)?({})$", what, where), value)
                for key, value in table.items()
            )
        )

    def get(self, module: str, default: T) -> T:
        return next((value for regex, value in self.entries if regex.match(module)), default)


@dataclass(frozen=True)
class LayerFilter:
    """``layers_to_transform`` with ``layers_pattern``: the layers that keep their modules."""

    indices: frozenset[int]
    patterns: tuple[re.Pattern[str], ...] = (_ANY_LAYER,)

    @classmethod
    def parse(cls, indices: object, names: object, where: str) -> "LayerFilter":
        chosen: set[int] = set()
        for index in indices if isinstance(indices, list) else [indices]:
            if not is_int(index):
                raise AdapterFormatError(
                    "layers_to_transform: expected an integer or a list of integers, "
                    f"got {shown(index)} ({where})"
                )
            chosen.add(index)
        if not names:
            return cls(frozenset(chosen))
        what = "layers_pattern"
        listed = name_list([names] if isinstance(names, str) else names, what, where)
        form = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
        return cls(
            frozenset(chosen), tuple(compile_regex(name, form, what, where) for name in listed)
        )

    def keeps(self, module: str) -> bool:
        for regex in self.patterns:
            found = regex.match(module)
            if found is not None:
                # A pattern with alternatives may match without reaching the index.
                index = found["idx"]
                return index is not None and int(index) in self.indices
        return False
