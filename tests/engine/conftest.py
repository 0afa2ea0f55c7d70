# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from .models import World  # needs peft, which not every test here does


@pytest.fixture(scope="session")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], World]":
    """World of an architecture, made once."""
    from .models import World

    return functools.cache(lambda arch: World(arch, tmp_path_factory.mktemp(arch)))


@pytest.fixture(scope="session")
def llama(world_of: "Callable[[str], World]") -> "World":
    return world_of("llama")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models only lose by more, above all beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
