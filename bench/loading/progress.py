# SPDX-License-Identifier: Apache-2.0
"""What is being measured: a bar on a terminal, where rich is installed; elsewhere a line a case."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from time import perf_counter

Shown = Callable[[str], AbstractContextManager[None]]


@contextmanager
def show_progress() -> Iterator[Shown]:
    if not sys.stdout.isatty() or find_spec("rich") is None:
        yield _line
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed} cases"), TimeElapsedColumn())
    # Refreshed by hand: a refreshing thread would disturb the timing.
    with Progress(
        *columns, TextColumn("{task.description}"), auto_refresh=False, transient=True
    ) as progress:
        task = progress.add_task("", total=None)

        @contextmanager
        def show(text: str) -> Iterator[None]:
            progress.update(task, description=text, refresh=True)
            yield
            progress.update(task, advance=1, refresh=True)

        yield show


@contextmanager
def _line(text: str) -> Iterator[None]:
    start = perf_counter()
    yield
    print(f"{text}: {perf_counter() - start:.1f} s", flush=True)
