# SPDX-License-Identifier: Apache-2.0
"""The engine says what PEFT says: alone, in mixed batches, and while running out of everything."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.engine.tiny import ADAPTERS, CONFIGS, Tenants, make_model, random_prompt

import toppings
from toppings.engine.batch import Chunk, pack

MODELS = list(CONFIGS)
NAMES = [None, *ADAPTERS]
COUNT = 12


@pytest.fixture(scope="module", params=MODELS)
def tenants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return Tenants.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(tenants: Tenants) -> dict[tuple[str | None, int], list[int]]:
    return {
        (name, i): tenants.greedy(name, random_prompt(5 + 7 * i, i), COUNT)
        for i in range(3)
        for name in NAMES
    }


def make_engine(tenants: Tenants, dtype: torch.dtype = torch.float32, **options) -> toppings.Engine:
    engine = toppings.Engine(make_model(tenants.name, dtype=dtype), **options)
    for name in ADAPTERS:
        engine.add_adapter(name, tenants.path(name))
    return engine


def test_adapters_differ(expected) -> None:
    """Otherwise the tests below would pass with adapters that are never applied."""
    for i in range(3):
        answers = {tuple(expected[name, i]) for name in NAMES}
        assert len(answers) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_alone(tenants: Tenants, expected, name: str | None) -> None:
    engine = make_engine(tenants)
    for i in range(3):
        params = toppings.SamplingParams(max_tokens=COUNT)
        request = engine.submit(random_prompt(5 + 7 * i, i), params, adapter=name)
        assert list(request) == expected[name, i]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 9, "max_running": 8, "block_size": 4},
        {"max_slots": 1, "block_size": 3},
        {"kv_blocks": 16, "block_size": 4, "max_batch_tokens": 13, "max_running": 12},
        {"mode": "cached"},
    ],
    ids=["roomy", "chunked", "one_slot", "few_blocks", "cached"],
)
def test_mixed_and_staggered(tenants: Tenants, expected, options) -> None:
    engine = make_engine(tenants, **options)
    requests = {}
    for i in range(3):
        for name in NAMES:
            params = toppings.SamplingParams(max_tokens=COUNT)
            prompt = random_prompt(5 + 7 * i, i)
            requests[name, i] = engine.submit(prompt, params, adapter=name)
            engine.step()
    engine.run()
    assert {key: request.output for key, request in requests.items()} == expected
    stats = engine.stats()
    assert stats.waiting == stats.running == 0
    assert stats.free_kv_blocks == options.get("kv_blocks", 1024)
    if "kv_blocks" in options:
        assert stats.preemptions > 0
    if options.get("max_slots") == 1:
        assert stats.loads >= len(ADAPTERS)


def packed(engine: toppings.Engine, prompts, names) -> torch.Tensor:
    """Logits of prompts in one pass, through the adapters' slots."""
    chunks, block = [], 1
    for prompt, name in zip(prompts, names, strict=True):
        slot = -1
        if name is not None:
            slot, _ = engine._attached.slots.acquire(engine._library.image(name))
        size = -(-len(prompt) // 16)
        blocks = list(range(block, block + size))
        block += size
        chunks.append(Chunk(prompt, 0, blocks, slot, blocks))
    return pack(chunks, 16)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_error_within_one_and_a_half_of_pefts(tenants: Tenants, name: str | None) -> None:
    prompt = random_prompt(40, 7)
    exact = tenants.logits(name, prompt)
    try:
        tenants.references[name].bfloat16()
        peft = tenants.logits(name, prompt).float()
    finally:
        tenants.references[name].float()
    engine = make_engine(tenants, torch.bfloat16, mode="cached")
    ours = engine._runner.forward(packed(engine, [prompt], [name])).float()
    scale = exact.norm()
    assert (ours - exact).norm() / scale <= 1.5 * (peft - exact).norm() / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_adapters_leave_no_trace(tenants: Tenants, dtype: torch.dtype) -> None:
    engine = make_engine(tenants, dtype, mode="cached")
    prompts = [random_prompt(n, n) for n in (1, 19, 1, 8, 5, 30)]
    names = ["odd", "rslora", None, "attention", "patterns", "odd"]
    batch = packed(engine, prompts, names)
    together = engine._runner.forward(batch).clone()
    for slot in set(batch.token_slots.tolist()):
        alone = torch.where(batch.token_slots == slot, batch.token_slots, -1)
        logits = engine._runner.forward(dataclasses.replace(batch, token_slots=alone))
        rows = batch.token_slots == slot
        assert torch.equal(logits[rows], together[rows])
        if slot >= 0:
            assert not torch.equal(logits[~rows], together[~rows])


def test_state_dict_survives(tenants: Tenants, tmp_path: Path) -> None:
    model = make_model(tenants.name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = toppings.Engine(model)
    during = model.state_dict()
    assert list(during) == list(before)
    engine.close()
    after = model.state_dict()
    for key, value in before.items():
        assert torch.equal(value, during[key]) and torch.equal(value, after[key])
    assert all(type(m) is not toppings.layers.LoraLinear for m in model.modules())
    ids = torch.tensor([random_prompt(9, 3)])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, make_model(tenants.name)(ids).logits)
