# SPDX-License-Identifier: Apache-2.0
"""Padded decode passes, computed here without a graph: the same tokens, and no look at the numbers
from the host, which a graph couldn't replay.
"""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import toppings
from toppings.engine.batch import Batch, Chunk, pack
from toppings.engine.decode_graph import DecodeGraphs
from toppings.engine.kv_cache import KvCache

from .models import ARCHITECTURES, TENANTS, World, greedy, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK_SIZE = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def world(request: pytest.FixtureRequest, world_of: Callable[[str], World]) -> World:
    return world_of(request.param)


def padded(engine: toppings.Engine, max_rows: int = 64) -> DecodeGraphs:
    """From now on the engine's decode passes are padded."""
    engine._runner.decode = engine._runner.padded_decode(max_rows)
    return engine._runner.decode


def decoding(engine: toppings.Engine, count: int) -> Batch:
    """A pass of `count` requests with one token each, of several adapters and lengths."""
    before, now, first = [], [], 1
    for i in range(count):
        length = 1 + 5 * i % 23
        blocks = list(range(first, first + -(-(length + 1) // BLOCK_SIZE)))
        first += len(blocks)
        name = TENANTS[i % len(TENANTS)]
        slot = -1 if name is None else engine._cached.by_name[name]
        tokens = prompt_of(length + 1, i)
        before.append(Chunk(tokens[:length], 0, blocks, slot, blocks))
        now.append(Chunk(tokens[length:], length, blocks, slot))
    decode, engine._runner.decode = engine._runner.decode, None
    engine._runner.forward(pack(before, BLOCK_SIZE))
    engine._runner.decode = decode
    return pack(now, BLOCK_SIZE)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 16])
def test_padding_changes_no_row(world: World, count: int) -> None:
    engine = world.engine(mode="cached", block_size=BLOCK_SIZE)
    batch = decoding(engine, count)
    exact = engine._runner.forward(batch)
    graphs = padded(engine)
    assert graphs.takes(batch)
    found = engine._runner.forward(batch)
    rows, width = graphs.sizes[0]
    assert rows >= count and width >= batch.decode_blocks.shape[1]
    assert rows & (rows - 1) == width & (width - 1) == 0
    # Attention may sum in another order over a wider table.
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    pick = torch.tensor([count - 1, 0])
    assert torch.equal(engine._runner.forward(batch, pick), found[pick])
    for k, v in engine._runner.cache.layers.values():
        assert not k[0].any() and not v[0].any()  # the null block


def test_tokens_are_pefts(world: World) -> None:
    engine = world.engine(block_size=BLOCK_SIZE, max_running=5, kv_blocks=40, max_slots=3)
    graphs = padded(engine, 5)
    asked = []
    for i in range(3):
        for name in TENANTS:
            asked.append((name, engine.submit(prompt_of(5 + 4 * i), greedy(12), name)))
            engine.step()
    engine.run()
    for name, request in asked:
        assert request.output == world.greedy(name, request.prompt, 12), name
    assert {rows for rows, _ in graphs.sizes} <= {1, 2, 4, 5}
    assert len(graphs.sizes) > 1


def test_poison_in_freed_blocks_and_in_the_scratch_block(llama: World) -> None:
    engine = llama.engine(block_size=BLOCK_SIZE, kv_blocks=20)
    padded(engine)
    list(engine.submit([3], greedy(2)))
    with torch.inference_mode():
        for tensors in engine._runner.cache.layers.values():
            for tensor in tensors:
                tensor[1:] = torch.nan
    asked = [(name, engine.submit(prompt_of(7), greedy(6), name)) for name in TENANTS[:3]]
    engine.run()
    assert all(r.output == llama.greedy(name, r.prompt, 6) for name, r in asked)


def test_what_is_no_decode_pass_is_not_taken(llama: World) -> None:
    graphs = padded(llama.engine(), 2)
    one = Chunk([5], 0, [1], -1, [1])
    assert graphs.takes(pack([one, one], 4))
    assert not graphs.takes(pack([one, one, one], 4))
    assert not graphs.takes(pack([one, Chunk([5, 6], 0, [1], -1)], 4))
    assert not graphs.takes(pack([Chunk([5], 4, [1, 2], -1, [1, 2])], 4))


@pytest.fixture
def fake_pass(world: World) -> Callable[[Batch], torch.Tensor]:
    """The pass of a padded batch with shapes alone: reading a number is an error there."""
    engine = world.engine(mode="cached", block_size=BLOCK_SIZE)
    runner = engine._runner

    def compute(batch: Batch) -> torch.Tensor:
        cache, runner.cache = runner.cache, KvCache(20, BLOCK_SIZE)
        try:
            with torch.inference_mode(False), torch.no_grad():
                return runner._compute(batch)
        finally:
            runner.cache = cache

    return compute


def test_nothing_is_read_by_the_host(fake_pass: Callable[[Batch], torch.Tensor]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        static = Batch(
            tokens=torch.zeros(4, dtype=torch.int64),
            positions=torch.zeros(4, dtype=torch.int64),
            kv_index=torch.zeros(4, dtype=torch.int64),
            new_blocks=torch.zeros(4, dtype=torch.int64),
            token_slots=torch.zeros(4, dtype=torch.int32),
            last_rows=torch.arange(4),
            num_decode=4,
            decode_blocks=torch.zeros(4, 2, dtype=torch.int64),
            decode_context=torch.zeros(4, dtype=torch.int64),
            segments=[],
        )
        assert fake_pass(static).shape == (4, 128)
        with pytest.raises(DataDependentOutputException):
            bool(static.tokens.any())  # what would be found
