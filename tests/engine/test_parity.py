# SPDX-License-Identifier: Apache-2.0
"""The engine's tokens are PEFT's, whatever shares a pass with a request and whatever runs short."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import toppings
from toppings.engine.batch import Batch, Chunk, pack

from .models import ARCHITECTURES, TENANTS, World, greedy, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 12
PROMPTS = [prompt_of(5), prompt_of(13), prompt_of(19)]
BLOCK_SIZE = 16  # the engine's default


@pytest.fixture(scope="module", params=ARCHITECTURES)
def world(request: pytest.FixtureRequest, world_of: Callable[[str], World]) -> World:
    return world_of(request.param)


def test_every_adapter_has_its_own_answers(world: World) -> None:
    """Otherwise the tests below would pass with adapters that are read but never applied."""
    engine = world.engine()
    answers = set()
    for name in TENANTS:
        asked = [engine.submit(prompt, greedy(COUNT), name) for prompt in PROMPTS]
        engine.run()
        answers.add(tuple(tuple(request.output) for request in asked))
    assert len(answers) == len(TENANTS)


def test_alone(world: World) -> None:
    engine = world.engine()
    for name in TENANTS:
        for prompt in PROMPTS:
            request = engine.submit(prompt, greedy(COUNT), name)
            assert list(request) == world.greedy(name, prompt, COUNT), (name, len(prompt))
            assert request.finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 9, "max_running": 8, "block_size": 4},
        {"max_batch_tokens": 7, "max_running": 3, "block_size": 1},
        {"kv_blocks": 16, "block_size": 4, "max_batch_tokens": 13, "max_running": 12},
        {"max_slots": 2, "block_size": 4},
        {"max_slots": 1, "kv_blocks": 12, "block_size": 4, "max_batch_tokens": 9, "max_running": 8},
    ],
    ids=["roomy", "chunked", "block_of_one", "few_blocks", "two_slots", "all_short"],
)
def test_mixed_and_staggered(world: World, options: dict[str, Any]) -> None:
    engine = world.engine(**options)
    asked = []
    for i, prompt in enumerate(PROMPTS):
        for name in TENANTS[i:] + TENANTS[:i]:
            asked.append((name, prompt, engine.submit(prompt, greedy(COUNT), name)))
            engine.step()
    engine.run()
    for name, prompt, request in asked:
        assert request.output == world.greedy(name, prompt, COUNT), (name, len(prompt))
        assert request.finish_reason == "length"
    stats = engine.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    assert stats.free_kv_blocks == options.get("kv_blocks", 1024)
    if options.get("kv_blocks") == 16:
        assert stats.preemptions > 0
    # In place an adapter's slot goes with its last request.
    slots = engine._attached.slots.stats()
    assert (slots.slots, slots.resident) == (options.get("max_slots", 8), 0)


def test_adapters_in_another_dtype(world: World) -> None:
    """The adapters are exact in bf16, so a bf16 arena under an fp32 model changes nothing."""
    engine = world.engine(lora_dtype=torch.bfloat16)
    asked = [(name, engine.submit(PROMPTS[1], greedy(COUNT), name)) for name in TENANTS]
    engine.run()
    for name, request in asked:
        assert request.output == world.greedy(name, PROMPTS[1], COUNT), name


def slot_of(engine: toppings.Engine, name: str | None) -> int:
    """In an engine of mode "cached"."""
    return -1 if name is None else engine._cached.by_name[name]


def prefilled_and_mixed(engine: toppings.Engine) -> Batch:
    """A pass of decoding requests and of chunks, two of them behind a prefix in the cache."""
    tenants = [*TENANTS, "odd", None, "rslora"]
    lengths = [(11, 1), (9, 1), (0, 17), (6, 5), (0, 3), (20, 1), (3, 1), (0, 2), (14, 9)]
    before, now, first = [], [], 1
    for i, (name, (past, new)) in enumerate(zip(tenants, lengths, strict=True)):
        count = -(-(past + new) // BLOCK_SIZE)
        blocks = list(range(first, first + count))
        first += count
        tokens, slot = prompt_of(past + new, i), slot_of(engine, name)
        if past:
            before.append(Chunk(tokens[:past], 0, blocks, slot, blocks))
        now.append(Chunk(tokens[past:], past, blocks, slot, () if past else blocks))
    engine._runner.forward(pack(before, BLOCK_SIZE))
    return pack(now, BLOCK_SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neighbours_adapters_leave_no_bit(world: World, dtype: torch.dtype) -> None:
    engine = world.engine(dtype, mode="cached")
    batch = prefilled_and_mixed(engine)
    slots = batch.token_slots
    together = engine._runner.forward(batch).clone()
    for slot in sorted(set(slots.tolist())):
        own = slots == slot
        without_others = dataclasses.replace(batch, token_slots=slots.where(own, -1))
        alone = engine._runner.forward(without_others)
        assert torch.equal(alone[own], together[own])
        if slot >= 0:
            assert (alone[~own & (slots >= 0)] != together[~own & (slots >= 0)]).any(-1).all()
            without_own = dataclasses.replace(batch, token_slots=slots.where(~own, -1))
            others = engine._runner.forward(without_own)
            assert (others[own] != together[own]).any(-1).all()
            assert torch.equal(others[~own], together[~own])


@pytest.mark.parametrize("name", TENANTS)
@torch.inference_mode()
def test_bf16_error_is_at_most_one_and_a_half_of_pefts(world: World, name: str | None) -> None:
    """Weights are the same bf16 values on all sides. Averaged over prompts: one is a coin toss."""
    engine = world.engine(torch.bfloat16, mode="cached")
    # A copy: the way there and back would leave the rotary frequencies rounded.
    rounded_model = copy.deepcopy(world.peft[name]).bfloat16()
    ours, pefts = 0.0, 0.0
    for seed in range(4):
        prompt = prompt_of(40, seed)
        exact = world.logits(name, prompt)
        rounded = rounded_model(input_ids=torch.tensor([prompt])).logits[0].float()
        chunk = Chunk(prompt, 0, [1, 2, 3], slot_of(engine, name), [1, 2, 3])
        logits = engine._runner.forward(pack([chunk], BLOCK_SIZE)).float()
        ours += float((logits - exact).norm() / exact.norm())
        pefts += float((rounded - exact).norm() / exact.norm())
    assert 0 < ours <= 1.5 * pefts
