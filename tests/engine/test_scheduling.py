# SPDX-License-Identifier: Apache-2.0
"""Budgets, slots and blocks hold at every step, and everything given out comes back."""

import contextlib
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import toppings
from toppings.engine.batch import Batch
from toppings.engine.request import Request
from toppings.engine.scheduler import MAX_BYPASSED
from toppings.errors import (
    InvalidRequestError,
    SlotsBusyError,
    UnknownAdapterError,
    UnsupportedModelError,
)

from .books import SLOW_LINK, FaultyLoader, check_books, check_empty
from .models import ADAPTERS, CONFIGS, TENANTS, World, greedy, make_model, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 6
TIGHT: dict[str, Any] = {
    "max_slots": 2,
    "kv_blocks": 14,
    "block_size": 3,
    "max_running": 5,
    "max_batch_tokens": 8,
}


def ask(engine: toppings.Engine, name: str | None, length: int = 7, count: int = COUNT) -> Request:
    return engine.submit(prompt_of(length), greedy(count), name)


def is_right(llama: World, request: Request, name: str | None) -> bool:
    return request.output == llama.greedy(name, request.prompt, request.params.max_tokens)


def watch(engine: toppings.Engine, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that the engine runs from now on."""
    seen: list[Batch] = []
    forward = engine._runner.forward

    def recorded(batch: Batch, *rest: Any) -> torch.Tensor:
        seen.append(batch)
        return forward(batch, *rest)

    monkeypatch.setattr(engine._runner, "forward", recorded)
    return seen


@pytest.mark.parametrize("seed", range(12))
def test_random_lives(llama: World, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Requests come and are aborted, adapters are replaced, passes and loads fail, at random."""
    chance = random.Random(seed)
    mode = ("blocking", "async", "layerwise")[seed % 3]
    link = chance.choice([None, SLOW_LINK, toppings.Link(2e9, 1e-5)])
    engine = toppings.Engine(make_model("llama"), **TIGHT, mode=mode, link=link)
    faults = FaultyLoader(engine)
    versions: dict[str, str] = {}  # name in the engine -> adapter behind it
    for name in ("x", "y", "z"):
        versions[name] = chance.choice(ADAPTERS)
        engine.add_adapter(name, llama.path(versions[name]))
    batches = watch(engine, monkeypatch)
    asked: list[tuple[str | None, Request]] = []
    for _ in range(70):
        roll = chance.random()
        if roll < 0.35:
            name = chance.choice([None, *versions])
            length, count = chance.choice([1, 2, 5, 9, 14]), chance.choice([1, 4, 10])
            asked.append((versions.get(name), ask(engine, name, length, count)))  # type: ignore[arg-type]
        elif roll < 0.42 and asked:
            chance.choice(asked)[1].abort()
        elif roll < 0.47:
            name = chance.choice(["x", "y", "z"])
            versions[name] = chance.choice(ADAPTERS)
            engine.add_adapter(name, llama.path(versions[name]))
        elif roll < 0.49:
            with monkeypatch.context() as patch:
                patch.setattr(engine._runner, "forward", lambda *_: 1 / 0)
                with contextlib.suppress(ZeroDivisionError):
                    engine.step()
        elif roll < 0.54:
            faults.at = chance.choice([0, 1, 2])
            engine.step()
            faults.at = None
        else:
            engine.step()
        check_books(engine)
    while engine.has_work:
        engine.step()
        check_books(engine)
    for adapter, request in asked:
        expected = llama.greedy(adapter, request.prompt, request.params.max_tokens)
        if request.finish_reason == "error":
            assert link is not None and "planted" in (request.error or "")
        if request.finish_reason in ("abort", "error"):
            assert request.output == expected[: len(request.output)]
        else:
            assert (request.finish_reason, request.output) == ("length", expected)
    check_empty(engine)
    assert max(len(b.tokens) for b in batches) <= TIGHT["max_batch_tokens"]
    assert max(len(b.last_rows) for b in batches) <= TIGHT["max_running"]


def test_decoding_goes_on_beside_a_long_prompt(llama: World) -> None:
    engine = llama.engine(max_batch_tokens=6, max_running=4)
    first = ask(engine, "odd", 4, 12)
    engine.step()
    long = ask(engine, "rslora", 40, 3)
    for given in range(2, 9):
        engine.step()
        assert len(first.output) == given and not long.output
    engine.run()
    assert is_right(llama, first, "odd") and is_right(llama, long, "rslora")


def test_busy_slots_let_requests_wait(llama: World) -> None:
    engine = llama.engine(max_slots=1, mode="blocking", link=SLOW_LINK)
    asked = [(name, ask(engine, name)) for name in TENANTS for _ in range(2)]
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (4, 8)  # the base model and the first adapter
    engine.run()
    assert all(is_right(llama, r, name) for name, r in asked)
    stats = engine.stats()
    assert (stats.loads, stats.prefetches) == (len(ADAPTERS), 0)
    assert stats.loaded_bytes > 0 and stats.stall_seconds > 0 and "emulated" in stats.device
    check_empty(engine)


def test_base_requests_do_not_starve_a_cold_adapter(llama: World) -> None:
    engine = llama.engine(max_slots=1, max_running=6)
    hot = [ask(engine, "odd"), ask(engine, None)]
    engine.step()
    cold = ask(engine, "rslora")
    younger = []
    while not cold.output:
        for name in (None, "odd"):
            younger.append((name, ask(engine, name, 3, 3)))
        engine.step()
        assert sum(bool(r.output) for _, r in younger) <= MAX_BYPASSED + 6
    engine.run()
    assert is_right(llama, cold, "rslora") and is_right(llama, hot[0], "odd")
    assert all(is_right(llama, r, name) for name, r in younger)


def test_too_few_blocks_lose_nothing(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine(kv_blocks=9, block_size=2)
    asked = [(name, ask(engine, name, 5, 12)) for name in TENANTS]
    oldest = asked[0][1]
    while not oldest.finished:
        before = len(oldest.output)
        engine.step()
        assert len(oldest.output) == before + 1  # never preempted for another
        check_books(engine)
    engine.run()
    assert engine.stats().preemptions > 0
    assert all(is_right(llama, r, name) for name, r in asked)
    check_empty(engine)


def test_aborting_a_preempted_request(llama: World) -> None:
    engine = llama.engine(kv_blocks=9, block_size=2)
    first, second = ask(engine, "odd", 5, 12), ask(engine, "rslora", 5, 12)
    while not engine.stats().preemptions:
        engine.step()
    assert second.output and second in engine._scheduler.waiting
    second.abort()
    assert list(second) == second.output
    assert list(first) == llama.greedy("odd", first.prompt, 12)
    check_empty(engine)


def test_the_largest_request_that_fits_fits(llama: World) -> None:
    engine = llama.engine(kv_blocks=5, block_size=4)
    assert is_right(llama, r := ask(engine, "odd", 13, 7), "odd") or list(r)
    assert is_right(llama, r, "odd")
    with pytest.raises(InvalidRequestError, match=r"at most 20 tokens .*got 14 \+ 7"):
        ask(engine, "odd", 14, 7)
    check_empty(engine)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda e: e.submit([]), InvalidRequestError),
        (lambda e: e.submit([3, 128]), InvalidRequestError),
        (lambda e: e.submit([-1, 3]), InvalidRequestError),
        (lambda e: e.submit([3] * 255, greedy(2)), InvalidRequestError),
        (lambda e: e.submit([3], adapter="nobody"), UnknownAdapterError),
        (lambda e: e.submit([3], adapter=""), UnknownAdapterError),
        (lambda e: e.submit([3], toppings.SamplingParams(max_tokens=0)), InvalidRequestError),
        (lambda e: e.submit([3], toppings.SamplingParams(temperature=-1)), InvalidRequestError),
        (lambda e: e.submit([3], toppings.SamplingParams(stop=[[]])), InvalidRequestError),
    ],
)
def test_refused_requests_change_nothing(
    llama: World, call: Callable[[toppings.Engine], object], error: type[Exception]
) -> None:
    engine = llama.engine(max_slots=2)
    running = ask(engine, "odd")
    engine.step()
    before = engine.stats()
    with pytest.raises(error):
        call(engine)
    assert engine.stats() == before
    check_books(engine)
    assert list(running) == llama.greedy("odd", running.prompt, COUNT)


def test_poison_in_freed_blocks_reaches_nobody(llama: World) -> None:
    engine = llama.engine(kv_blocks=12, block_size=4)
    for poison in (torch.nan, torch.inf):
        free = list(engine._pool._free)  # all but the null block, which is nobody's
        assert len(free) == 12
        with torch.inference_mode():
            for tensors in engine._runner.cache.layers.values():
                for tensor in tensors:
                    tensor[free] = poison
        asked = [(name, ask(engine, name, 9)) for name in TENANTS]
        engine.run()
        assert all(is_right(llama, r, name) for name, r in asked)


def test_a_failing_neighbour_in_every_pass(llama: World) -> None:
    """An adapter whose numbers overflow, in the same passes as others, and its blocks after it."""
    engine = llama.engine(kv_blocks=20, block_size=2, max_batch_tokens=12, max_running=8)
    source = toppings.read_adapter(llama.path("patterns"))
    wild = {k: (m.a * 1e25, m.b * 1e25, m.scale) for k, m in source.modules.items()}
    engine.add_adapter("wild", toppings.Adapter.from_tensors(wild))
    asked, bad = [], []
    for name in TENANTS:
        asked.append((name, ask(engine, name, 5)))
        bad.append(ask(engine, "wild", 6))
        engine.step()
    engine.run()
    assert all(is_right(llama, r, name) for name, r in asked)
    for request in bad:
        assert (request.finish_reason, request.output) == ("error", [])
        with pytest.raises(toppings.ToppingsError, match="not finite"):
            list(request)
        with pytest.raises(toppings.ToppingsError, match="not finite"):
            list(request)  # still
    check_empty(engine)


def test_two_threads_over_the_same_requests(llama: World) -> None:
    engine = llama.engine(**TIGHT)
    asked = [(name, ask(engine, name, 4)) for name in TENANTS]
    found: list[list[list[int]]] = [[], []]

    def read(i: int) -> None:
        order = asked if i else asked[::-1]
        found[i] = [list(r) for _, r in order]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    expected = [llama.greedy(name, r.prompt, COUNT) for name, r in asked]
    assert found == [expected[::-1], expected]
    check_empty(engine)


def test_adapters_change_while_another_thread_steps(llama: World) -> None:
    engine = toppings.Engine(make_model("llama"), **TIGHT)
    engine.add_adapter("x", llama.path("odd"))
    asked: list[tuple[str, Request]] = []
    done = threading.Event()

    def steps() -> None:
        while not done.is_set():
            engine.step()

    stepper = threading.Thread(target=steps)
    stepper.start()
    try:
        for i in range(24):
            version = ADAPTERS[i % len(ADAPTERS)]
            engine.add_adapter("x", llama.path(version))
            asked.append((version, ask(engine, "x", 3 + i % 5)))
        given = [list(r) for _, r in asked]
    finally:
        done.set()
        stepper.join(60)
    assert not stepper.is_alive()
    assert given == [llama.greedy(name, r.prompt, COUNT) for name, r in asked]
    engine.remove_adapter("x")
    check_empty(engine)


class StepBetween(list):
    """An output that another thread extends right after an iterator has seen its end."""

    def __init__(self, engine: toppings.Engine, last: int) -> None:
        super().__init__()
        self.engine, self.last, self.reads = engine, last, 0

    def __getitem__(self, index):
        self.reads += isinstance(index, int)  # the engine takes slices
        return super().__getitem__(index)

    def __len__(self) -> int:
        size = super().__len__()
        if size == self.reads == self.last:  # all that there is has been given
            self.last = -1
            self.engine.step()
        return size


def test_the_last_token_is_not_lost_to_another_threads_step(llama: World) -> None:
    engine = llama.engine()
    request = ask(engine, "odd")
    request.output = StepBetween(engine, COUNT - 1)
    given = list(request)
    assert given == llama.greedy("odd", request.prompt, COUNT)


def test_cached_mode_serves_requests_of_a_removed_adapter(llama: World) -> None:
    """Those submitted before run to their end, even when their slot was pinned for another."""
    engine = toppings.Engine(make_model("llama"), mode="cached", max_slots=1)
    engine.add_adapter("x", llama.path("odd"))
    request = ask(engine, "x")
    engine.remove_adapter("x")
    with contextlib.suppress(SlotsBusyError):  # fine too: the slot is needed still
        engine.add_adapter("y", llama.path("rslora"))
    for _ in range(3 * COUNT):
        engine.step()
    assert is_right(llama, request, "odd")


def test_close_gives_the_model_back(llama: World) -> None:
    model, ids = make_model("llama"), torch.tensor([prompt_of(9)])
    with torch.inference_mode():
        logits = model(ids).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modules, attention = dict(model.named_modules()), model.config._attn_implementation
    for _ in range(2):  # and a second engine can be made
        engine = toppings.Engine(model)
        engine.add_adapter("odd", llama.path("odd"))
        left = ask(engine, "odd")
        engine.step()
        assert list(done := ask(engine, "odd")) == llama.greedy("odd", done.prompt, COUNT)
        other = ask(engine, "odd", 5)
        engine.close()
        engine.close()
        assert other.finish_reason == "abort" and left.finish_reason == "length"
        assert {k: id(m) for k, m in model.named_modules()} == {
            k: id(m) for k, m in modules.items()
        }
        assert model.config._attn_implementation == attention
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, logits)


def like_llama(kind: str, **options: Any) -> Any:
    common = CONFIGS["llama"].to_dict()
    for key in ("model_type", "architectures", "rope_parameters", "head_dim", "hidden_act"):
        common.pop(key, None)
    names = [f"{kind}TextConfig", f"{kind}Config"]
    config = next(c for n in names if (c := getattr(transformers, n, None)))
    return getattr(transformers, f"{kind}ForCausalLM")(config(**(common | options)))


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **options}


def longrope() -> nn.Module:
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    parameters = rope("longrope", original_max_position_embeddings=128, **factors)
    return like_llama("Phi3", rope_parameters=parameters)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.BertLMHeadModel(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64)
    return transformers.GPT2LMHeadModel(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "dynamic_rope": lambda: like_llama("Llama", rope_parameters=rope("dynamic")),
    "longrope": longrope,
    "encoder_decoder": t5,
    "bidirectional": bert,
    "no_linears": gpt2,
    "no_attention": mamba,
    # Attention that the paged one doesn't compute: in chunks of positions, twice a layer, under a
    # mask of the model's own.
    "chunked_attention": lambda: like_llama("Llama4", attention_chunk_size=4, num_local_experts=2),
    "two_attentions": lambda: like_llama("DiffLlama"),
    "own_mask": lambda: like_llama("Doge", keep_window_size=4),
    # Their layers don't pass arguments on to the attention.
    "closed_layers": lambda: like_llama("StableLm", partial_rotary_factor=0.5),
    "closed_layers_too": lambda: like_llama("Nemotron"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_left_as_they_were(kind: str) -> None:
    model = UNSUPPORTED[kind]().eval()
    modules = {k: id(m) for k, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError):
        toppings.Engine(model)
    assert {k: id(m) for k, m in model.named_modules()} == modules
    assert model.config._attn_implementation == attention
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_module_that_is_no_transformers_model() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a transformers model"):
        toppings.Engine(nn.Sequential(nn.Sequential(nn.Linear(3, 3))))  # type: ignore[arg-type]
