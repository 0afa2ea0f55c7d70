# SPDX-License-Identifier: Apache-2.0
"""Requests come, go, are aborted and fail, and adapters change, without touching each other."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import toppings
from toppings._runtime import Device
from toppings.engine.scheduler import MAX_BYPASSED
from toppings.errors import (
    AdapterMismatchError,
    InvalidArgumentError,
    InvalidRequestError,
    RequestFailedError,
    SlotsBusyError,
    StoreFullError,
    UnknownAdapterError,
    UnsupportedModelError,
)

from .models import ADAPTERS, CONFIGS, World, greedy, make_model, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 8
PARAMS = greedy(COUNT)
FAST_LINK = toppings.Link(bytes_per_second=1e9)


@pytest.fixture
def engine(llama: World) -> Iterator[toppings.Engine]:
    engine = make_engine(llama)
    yield engine
    engine.close()


def make_engine(llama: World, names=tuple(ADAPTERS), **options) -> toppings.Engine:
    engine = toppings.Engine(make_model("llama"), **options)
    for name in names:
        engine.add_adapter(name, llama.path(name))
    return engine


def answer(engine: toppings.Engine, name: str | None, seed: int = 1) -> list[int]:
    return list(engine.submit(prompt_of(9, seed), PARAMS, adapter=name))


def is_empty(engine: toppings.Engine) -> bool:
    stats = engine.stats()
    slots = engine._attached.slots.stats()
    idle = stats.running == stats.waiting == slots.pinned == 0
    return idle and stats.free_kv_blocks == engine._pool.num_blocks


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_abort_at_every_stage_gives_everything_back(llama: World, steps: int) -> None:
    engine = make_engine(llama, max_batch_tokens=6, max_running=4)
    expected = answer(engine, "rslora")
    other = engine.submit(prompt_of(9, 1), PARAMS, adapter="rslora")
    request = engine.submit(prompt_of(20, 2), PARAMS, adapter="odd")
    for _ in range(steps):
        engine.step()
    request.abort()
    request.abort()
    assert request.finish_reason == "abort"
    assert list(request) == request.output
    assert list(other) == expected
    assert is_empty(engine)


def test_replaced_and_removed_adapters_serve_those_who_asked_before(
    engine: toppings.Engine, llama: World
) -> None:
    old, new = answer(engine, "odd"), answer(engine, "patterns")
    assert old != new
    before = engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
    engine.step()
    waiting = engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
    engine.add_adapter("odd", llama.path("patterns"))
    after = engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
    engine.remove_adapter("odd")
    with pytest.raises(UnknownAdapterError, match="'odd'"):
        engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
    with pytest.raises(UnknownAdapterError, match="'odd'"):
        engine.remove_adapter("odd")
    assert (list(before), list(waiting), list(after)) == (old, old, new)
    assert "odd" not in engine.adapters()
    engine.add_adapter("odd", llama.path("odd"))
    assert answer(engine, "odd") == old


def test_a_cold_adapter_is_not_starved_by_hot_ones(llama: World) -> None:
    engine = make_engine(llama, max_slots=1)
    hot = [engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")]
    engine.step()
    cold = engine.submit(prompt_of(9, 1), PARAMS, adapter="rslora")
    passed = 0
    while not cold.output:
        hot.append(engine.submit(prompt_of(9, 1), PARAMS, adapter="odd"))
        engine.step()
        passed += 1
        assert passed < MAX_BYPASSED + 3 * COUNT
    assert passed > MAX_BYPASSED  # the bound was reached, and not something else
    engine.run()
    assert len({tuple(request.output) for request in hot}) == 1
    assert is_empty(engine)


def test_requests_the_engine_can_never_serve_are_refused(engine: toppings.Engine) -> None:
    small = toppings.Engine(make_model("llama"), kv_blocks=2, block_size=4)
    for call, error, text in [
        (lambda: engine.submit([]), InvalidRequestError, "at least one token"),
        (lambda: engine.submit([1, 128]), InvalidRequestError, "got 128"),
        (lambda: engine.submit([-1]), InvalidRequestError, "got -1"),
        (lambda: engine.submit([3], adapter="nobody"), UnknownAdapterError, "'nobody'"),
        (lambda: engine.submit([3] * 250), InvalidRequestError, r"256 .*250 \+ 16"),
        (lambda: small.submit([3] * 5, PARAMS), InvalidRequestError, r"8 .*5 \+ 8"),
    ]:
        with pytest.raises(error, match=text):
            call()
    assert is_empty(engine) and is_empty(small)


def test_stale_nans_reach_nobody(llama: World) -> None:
    engine = make_engine(llama, kv_blocks=12, block_size=4)
    expected = [answer(engine, name) for name in (None, *ADAPTERS)]
    with torch.inference_mode():
        for tensors in engine._runner.cache.layers.values():
            for tensor in tensors:
                tensor[1:] = torch.nan  # all but the null block
    assert [answer(engine, name) for name in (None, *ADAPTERS)] == expected


def test_an_adapter_that_overflows_fails_alone(engine: toppings.Engine, llama: World) -> None:
    wild = toppings.read_adapter(llama.path("odd"))
    modules = {p: (m.a * 1e30, m.b * 1e30, m.scale) for p, m in wild.modules.items()}
    engine.add_adapter("wild", toppings.Adapter.from_tensors(modules))
    expected = answer(engine, "rslora"), answer(engine, None)
    good = engine.submit(prompt_of(9, 1), PARAMS, adapter="rslora")
    bad = engine.submit(prompt_of(9, 1), PARAMS, adapter="wild")
    base = engine.submit(prompt_of(9, 1), PARAMS)
    with pytest.raises(RequestFailedError, match="not finite"):
        list(bad)
    assert bad.finish_reason == "error"
    assert (list(good), list(base)) == expected
    assert is_empty(engine)


def test_a_pass_that_fails_counts_as_not_run(engine: toppings.Engine, monkeypatch) -> None:
    expected = answer(engine, "odd"), answer(engine, None)
    first = engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
    engine.step()
    second = engine.submit(prompt_of(9, 1), PARAMS)
    forward = engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert engine.stats().running == 0 and engine.stats().waiting == 2
    monkeypatch.setattr(engine._runner, "forward", forward)
    assert (list(first), list(second)) == expected
    assert is_empty(engine)


def test_threads_may_share_an_engine(engine: toppings.Engine) -> None:
    names = [None, *ADAPTERS]
    expected = [answer(engine, name) for name in names]
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = answer(engine, names[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(len(names))] == expected


def test_cached_mode_keeps_what_was_added(llama: World) -> None:
    engine = make_engine(llama, names=["odd", "rslora"], mode="cached", max_slots=2, link=FAST_LINK)
    with pytest.raises(SlotsBusyError):
        engine.add_adapter("patterns", llama.path("patterns"))
    assert engine.adapters() == ["odd", "rslora"] and engine.stats().loads == 2
    engine.remove_adapter("odd")
    engine.add_adapter("patterns", llama.path("patterns"))
    answer(engine, "patterns")
    assert engine.stats().loads == 3


def test_an_adapter_that_cannot_be_added_leaves_the_store(llama: World) -> None:
    tight = make_engine(llama, names=[], arena_bytes=20_000)
    full = make_engine(llama, names=["odd"], mode="cached", max_slots=1, link=FAST_LINK)
    for engine, error in [(tight, AdapterMismatchError), (full, SlotsBusyError)]:
        before = engine._library._store.stats()
        with pytest.raises(error):
            engine.add_adapter("rslora", llama.path("rslora"))
        assert engine._library._store.stats() == before
    with pytest.raises(SlotsBusyError):
        full.add_adapter("rslora", twice := toppings.read_adapter(llama.path("rslora")))
    full.remove_adapter("odd")
    full.add_adapter("rslora", twice)
    assert len(answer(full, "rslora")) == COUNT


def test_a_closed_engine_refuses(llama: World, tmp_path: Path) -> None:
    for mode in ("layerwise", "cached"):
        with make_engine(llama, names=["odd"], mode=mode, link=FAST_LINK) as engine:
            request = engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
        assert request.finish_reason == "abort"
        before = engine._library._store.stats()
        for call in (
            lambda e=engine: e.submit([3]),
            lambda e=engine: e.add_adapter("x", llama.path("rslora")),
            lambda e=engine: e.add_adapter("x", toppings.read_adapter(llama.path("rslora"))),
        ):
            with pytest.raises(InvalidRequestError, match="got one that was closed"):
                call()
        assert engine.adapters() == ["odd"] and engine._library._store.stats() == before


@pytest.mark.parametrize("mode", ["layerwise", "cached"])
def test_closing_while_an_adapter_is_added(llama: World, mode: str, monkeypatch) -> None:
    engine = make_engine(llama, names=[], mode=mode, link=FAST_LINK)
    prepare = engine._library.prepare

    def closing(*args):
        prepared = prepare(*args)
        engine.close()
        return prepared

    monkeypatch.setattr(engine._library, "prepare", closing)
    with pytest.raises(InvalidRequestError, match="got one that was closed"):
        engine.add_adapter("odd", llama.path("odd"))
    assert engine.adapters() == [] and is_empty(engine)
    assert engine._library._store.stats().images == 0


def test_closing_twice_leaves_another_engine_alone(llama: World) -> None:
    model = make_model("llama")
    first = toppings.Engine(model)
    first.close()
    with toppings.Engine(model) as second:
        second.add_adapter("odd", llama.path("odd"))
        first.close()
        expected = llama.greedy("odd", prompt_of(9, 1), COUNT)
        assert answer(second, "odd") == expected


def test_budgets_are_kept(llama: World) -> None:
    engine = make_engine(llama, names=[], host_bytes=170_000)
    engine.add_adapter("odd", llama.path("odd"))
    held = engine.submit(prompt_of(9, 1), PARAMS, adapter="odd")
    with pytest.raises(StoreFullError):
        engine.add_adapter("rslora", llama.path("rslora"))
    assert engine.adapters() == ["odd"] and len(list(held)) == COUNT
    tight = make_engine(llama, names=[], arena_bytes=20_000)
    with pytest.raises(AdapterMismatchError, match="arena_bytes"):
        tight.add_adapter("rslora", llama.path("rslora"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "planned"}, "mode: expected one of cached, .* got 'planned'"),
        ({"device": "cuda"}, "model: expected it on device 'cuda', got it on cpu"),
        ({"device": "tpu"}, "device: expected 'cpu'"),
        ({"device": "cpu:1"}, "device: expected 'cpu'"),
        ({"device": Device.host(1e9), "link": FAST_LINK}, "link: expected none"),
        ({"link": toppings.Link(-1.0)}, ""),
        ({"max_stall_ms": -1.0}, "max_stall_ms"),
        ({"max_slots": 0}, "max_slots"),
        ({"max_rank": 0}, "max_rank"),
        ({"kv_blocks": 0}, "kv_blocks"),
        ({"max_running": 8, "max_batch_tokens": 8}, "max_batch_tokens"),
        ({"lora_dtype": torch.int8}, "lora_dtype"),
        ({"arena_bytes": 10}, "arena_bytes"),
        ({"host_bytes": 0}, "budget"),
        ({"link": 4e9}, r"link: expected a toppings.Link or None, got 4000000000.0"),
        ({"max_stall_ms": "2"}, "max_stall_ms: expected a number, got '2'"),
        ({"max_slots": 1 << 31}, "max_slots: expected an integer up to 2147483647"),
        ({"max_slots": 2.0}, "max_slots: expected an integer, got 2.0"),
        ({"loader_cpu": "1"}, "loader_cpu: expected an integer, got '1'"),
        ({"host_bytes": 1 << 63}, "host_bytes: expected an integer up to"),
        ({"arena_bytes": "1"}, "arena_bytes: expected an integer, got '1'"),
    ],
)
def test_options_out_of_range_leave_the_model_alone(options, text: str) -> None:
    model = make_model("llama")
    with pytest.raises(InvalidArgumentError, match=text):
        toppings.Engine(model, **options)
    toppings.Engine(model).close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("4e9",), "link bytes_per_second: expected a number, got '4e9'"),
        ((None,), "link bytes_per_second: expected a number, got None"),
        ((4e9, "0"), "link latency_seconds: expected a number, got '0'"),
        ((4e9, 0.0, 1.5), "link cpu: expected an integer, got 1.5"),
        ((4e9, 0.0, 1 << 40), "link cpu: expected an integer up to 2147483647"),
    ],
)
def test_links_are_made_of_numbers(arguments, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        toppings.Link(*arguments)


def test_models_that_cannot_be_served_are_refused_as_they_were() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = copy.deepcopy(CONFIGS["llama"])
    config.rope_parameters = rope
    gpt = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64)
    for refused, text in [(config, "dynamic"), (gpt, "nn.Linear")]:
        model = transformers.AutoModelForCausalLM.from_config(refused).eval()
        kind, attention = [type(m) for m in model.modules()], model.config._attn_implementation
        with pytest.raises(UnsupportedModelError, match=text):
            toppings.Engine(model)
        assert [type(m) for m in model.modules()] == kind
        assert model.config._attn_implementation == attention


def test_a_changed_folder_is_noticed(llama: World, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.symlink_to(llama.path("odd"))
    engine = make_engine(llama, names=[])
    engine.add_adapter("x", folder)
    store, digest = engine._library._store, engine._library._entries["x"].digest
    expected = answer(engine, "x")
    assert store.erase(digest)  # as if it had been evicted
    assert answer(engine, "x") == expected
    store.erase(digest)
    folder.unlink()
    folder.symlink_to(llama.path("rslora"))
    with pytest.raises(RequestFailedError, match="can't be read: .*files it was added with"):
        answer(engine, "x")
    assert is_empty(engine)
