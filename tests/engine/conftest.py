# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable

import pytest

from .models import World


@pytest.fixture(scope="session")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """World of an architecture, made once."""
    return functools.cache(lambda arch: World(arch, tmp_path_factory.mktemp(arch)))


@pytest.fixture(scope="session")
def llama(world_of: Callable[[str], World]) -> World:
    return world_of("llama")
