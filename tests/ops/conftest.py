# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from toppings import cpu


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "generic"])
def level(request: pytest.FixtureRequest):
    """Every level that this CPU has."""
    if request.param not in cpu.supported_levels():
        pytest.skip(f"this CPU has no {request.param}")
    before = cpu.level()
    cpu.set_level(request.param)
    yield request.param
    cpu.set_level(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
