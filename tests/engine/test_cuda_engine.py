# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU over its real link, and the very same tests on the CPU over an emulated one:
token for token what the merged weights give.
"""

import functools
from typing import Any

import pytest
import torch
from torch.utils.dlpack import from_dlpack

import toppings

from .plain import LAYERS, PlainWorld, greedy, prompt_of

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 10
PROMPTS = [prompt_of(3), prompt_of(21), prompt_of(50)]
LINK = toppings.Link(bytes_per_second=100e6, latency_seconds=1e-5)  # "r64": 3 MB, 30 ms


@functools.cache
def plain_world(device: str) -> PlainWorld:
    return PlainWorld(device)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def world(request: pytest.FixtureRequest) -> PlainWorld:
    return plain_world(request.param)


def engine_of(
    world: PlainWorld, dtype: torch.dtype = torch.float32, **options: Any
) -> toppings.Engine:
    where = {"device": "cuda"} if world.device == "cuda" else {"link": LINK}
    engine = toppings.Engine(world.model(dtype), **{"kv_blocks": 128, **where, **options})
    for name, adapter in world.adapters.items():
        engine.add_adapter(name, adapter)
    return engine


def test_every_adapter_has_its_own_answer(world: PlainWorld) -> None:
    answers = {tuple(world.greedy(name, PROMPTS[1], COUNT)) for name in world.tenants}
    assert len(answers) == len(world.tenants)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("mode", ["cached", "blocking", "async", "layerwise"])
def test_every_mode_gives_the_merged_models_tokens(
    world: PlainWorld, mode: str, graphs: bool
) -> None:
    slots = 4 if mode == "cached" else 2  # of four adapters
    engine = engine_of(
        world, mode=mode, cuda_graphs=graphs, max_slots=slots, max_running=6, max_batch_tokens=48
    )
    asked = []
    for prompt in PROMPTS:
        for name in world.tenants:
            asked.append((name, engine.submit(prompt, greedy(COUNT), name)))
            engine.step()
    engine.run()
    for name, request in asked:
        assert request.output == world.greedy(name, request.prompt, COUNT), (name, request)
    stats = engine.stats()
    assert stats.loads >= 4 and stats.loaded_bytes > 0
    assert engine._attached.slots.stats().pinned == (4 if mode == "cached" else 0)
    assert (engine._runner.decode is not None) == (graphs and world.device == "cuda")
    engine.close()


def test_cold_requests_alone(world: PlainWorld) -> None:
    """Nothing is warm, and layerwise gates the whole prefill."""
    for name in world.tenants[1:]:
        engine = engine_of(world, mode="layerwise")
        request = engine.submit(PROMPTS[2], greedy(COUNT), name)
        assert list(request) == world.greedy(name, PROMPTS[2], COUNT)
        engine.close()


@pytest.mark.parametrize("mode", ["cached", "blocking", "async", "layerwise"])
def test_adapters_are_replaced_while_they_run(world: PlainWorld, mode: str) -> None:
    engine = engine_of(world, mode=mode, max_slots=5)
    old = engine.submit(PROMPTS[1], greedy(COUNT), "r16")
    engine.step()
    engine.add_adapter("r16", world.adapters["part"])
    new = engine.submit(PROMPTS[1], greedy(COUNT), "r16")
    engine.run()
    assert old.output == world.greedy("r16", PROMPTS[1], COUNT)
    assert new.output == world.greedy("part", PROMPTS[1], COUNT)
    engine.close()


def test_aborts_and_preemption_leave_the_others_alone(world: PlainWorld) -> None:
    engine = engine_of(world, max_slots=2, kv_blocks=14, block_size=8, max_running=5)
    asked = [(name, engine.submit(PROMPTS[1], greedy(40), name)) for name in world.tenants]
    gone = [engine.submit(PROMPTS[0], greedy(40), name) for name in world.tenants]
    for request in gone:
        engine.step()
        request.abort()
    engine.run()
    assert engine.stats().preemptions > 0
    for name, request in asked:
        assert request.output == world.greedy(name, PROMPTS[1], 40), name
    engine.close()


def test_bf16_is_near(world: PlainWorld) -> None:
    """The weights are exact in bf16, so only the arithmetic differs."""
    engine = engine_of(world, torch.bfloat16, mode="cached")
    for name in world.tenants:
        (token,) = engine.submit(PROMPTS[1], greedy(1), name)
        logits = world.logits(name, PROMPTS[1])[-1]
        assert logits[token] > logits.max() - 0.1 * logits.std()
    engine.close()


def test_attached_by_hand_layers_wait_for_their_load(world: PlainWorld) -> None:
    plain = world.model()
    device = toppings.Device.host(LINK.bytes_per_second) if world.device == "cpu" else None
    attached = toppings.attach(plain, device=device, max_slots=2, arena_bytes=8 << 20)
    store = toppings.HostStore(64 << 20, attached.device)
    library = toppings.AdapterLibrary(store, attached.shape, attached.modules, torch.float32)
    ids = torch.tensor([PROMPTS[1]], device=world.device)
    for name in ("r64", "r4", "part"):
        slot, resident = attached.slots.acquire(library.add(name, world.adapters[name]))
        assert not resident
        ticket = attached.loader.load(slot)
        slots = torch.full((ids.shape[1],), slot, dtype=torch.int32, device=world.device)
        attached.set_batch(slots, [ticket])
        with torch.inference_mode():
            logits = attached.model(input_ids=ids, use_cache=False).logits[0].cpu()
        expected = world.logits(name, PROMPTS[1])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert ticket.num_arrived == LAYERS
        attached.slots.release(slot)
    attached.detach()


@NEEDS_GPU
def test_the_arena_lies_on_the_gpu() -> None:
    engine = engine_of(plain_world("cuda"))
    layer = from_dlpack(engine._attached.arena.layer(0))
    assert layer.is_cuda and engine._attached.device.kind == "cuda"
    assert "emulated" not in engine.stats().device
    engine.close()


@NEEDS_GPU
def test_graphs_are_replayed() -> None:
    world = plain_world("cuda")
    engine = engine_of(world, mode="cached")
    sizes = []
    for tenants in (world.tenants, world.tenants[::-1]):
        asked = [(name, engine.submit(PROMPTS[0], greedy(30), name)) for name in tenants]
        engine.run()
        assert all(r.output == world.greedy(name, PROMPTS[0], 30) for name, r in asked)
        sizes.append(engine._runner.decode.sizes)
    assert sizes[0] == sizes[1] and len(sizes[0]) > 1
    engine.close()
