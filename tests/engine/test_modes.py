# SPDX-License-Identifier: Apache-2.0
"""Cold adapters over an emulated link: every mode gives the tokens of a warm engine, whatever fails
or is given up on the way, and those who don't wait for a load aren't kept waiting.
"""

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

import toppings
from toppings.engine.request import Request
from toppings.errors import CancelledError, DeviceError, RequestFailedError

from .books import SLOW_LINK, FaultyLoader, check_books, check_empty, eventually
from .models import ADAPTERS, TENANTS, World, greedy, make_model, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 8
LOADING = ["blocking", "async", "layerwise"]
PREFETCHING = ["async", "layerwise"]
FAST = toppings.Link(bytes_per_second=2e9)
CRAWLING = toppings.Link(bytes_per_second=0.5e6)  # "rslora", 150 kB, takes a third of a second


def engine_of(llama: World, **options: Any) -> toppings.Engine:
    return llama.engine(**{"link": SLOW_LINK, **options})


def ask(engine: toppings.Engine, name: str | None, length: int = 7, count: int = COUNT) -> Request:
    return engine.submit(prompt_of(length), greedy(count), name)


def is_right(llama: World, request: Request, name: str | None) -> bool:
    return request.output == llama.greedy(name, request.prompt, request.params.max_tokens)


def run_checked(engine: toppings.Engine) -> None:
    while engine.has_work:
        engine.step()
        check_books(engine)
    check_empty(engine)


@pytest.mark.parametrize("link", [None, FAST, SLOW_LINK], ids=["in_place", "fast", "slow"])
@pytest.mark.parametrize("mode", ["cached", *LOADING])
def test_every_mode_gives_the_same_tokens(
    llama: World, mode: str, link: toppings.Link | None
) -> None:
    engine = engine_of(llama, mode=mode, link=link)
    assert engine._attached.arena.is_in_place == (link is None)
    asked = []
    for length in (5, 13, 19):
        for name in TENANTS:
            asked.append((name, ask(engine, name, length)))
            engine.step()
    run_checked(engine)
    assert all(is_right(llama, r, name) for name, r in asked)
    stats = engine.stats()
    assert stats.loads == (0 if link is None else len(ADAPTERS))
    assert stats.prefetches == (stats.loads if mode in PREFETCHING else 0)
    assert ("emulated" in stats.device) == ("emulated" in repr(engine)) == (link is not None)


@pytest.mark.parametrize("mode", LOADING)
@pytest.mark.parametrize("max_slots", [1, 2])
def test_many_more_adapters_than_slots(llama: World, mode: str, max_slots: int) -> None:
    engine = engine_of(llama, mode=mode, max_slots=max_slots, max_batch_tokens=9, max_running=6)
    asked = [(name, ask(engine, name, 5 + i)) for i in range(4) for name in TENANTS]
    run_checked(engine)
    assert all(is_right(llama, r, name) for name, r in asked)
    assert engine._attached.slots.stats().evictions > 0


@pytest.mark.parametrize("mode", LOADING)
def test_preemption_while_loading(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, kv_blocks=9, block_size=2, max_slots=2)
    asked = [(name, ask(engine, name, 5, 12)) for name in TENANTS]
    run_checked(engine)
    assert engine.stats().preemptions > 0
    assert all(is_right(llama, r, name) for name, r in asked)


@pytest.mark.parametrize("mode", PREFETCHING)
def test_the_load_begins_when_the_request_is_queued(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode)
    request = ask(engine, "rslora")
    assert engine.stats().prefetches == 1 and request.slot >= 0
    eventually(lambda: request.ticket.status == "loaded")  # before anybody steps
    engine.step()
    assert len(request.output) == 1 and request.ticket is None
    engine.run()
    assert is_right(llama, request, "rslora")


@pytest.mark.parametrize("mode", ["cached", "blocking"])
def test_other_modes_begin_nothing_early(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode)
    loads = engine.stats().loads
    request = ask(engine, "rslora")
    assert engine.stats().loads == loads and request.slot < 0
    assert len(list(request)) == COUNT


@pytest.mark.parametrize("mode", PREFETCHING)
def test_others_go_on_during_a_load(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, link=CRAWLING)
    running = ask(engine, "attention", 5, 200)
    while not running.output:
        engine.step()
    cold = ask(engine, "rslora")
    stalled = engine.stats().stall_seconds
    times, ended = [running.token_times[-1]], []
    while not cold.output:
        if running.finished:  # on a fast machine
            ended.append(running)
            running = ask(engine, "attention", 5, 200)
        assert running in engine.step()  # a token for it in every pass
        times.append(running.token_times[-1])
    assert len(times) > 20
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert cold.ticket is None
    assert cold.token_times[0] - cold.arrival_time > 0.2  # the load took that long
    assert sorted(gaps)[-3] < 0.1  # the machine may be busy otherwise
    if mode == "layerwise":
        assert engine.stats().stall_seconds - stalled < 0.05  # 2 ms are expected at most
    engine.run()
    assert is_right(llama, cold, "rslora")
    assert all(is_right(llama, request, "attention") for request in [*ended, running])


def test_blocking_keeps_everybody_waiting(llama: World) -> None:
    """What the other modes are for."""
    engine = engine_of(llama, mode="blocking", link=CRAWLING)
    running = ask(engine, None, 5, 40)
    engine.step()
    cold = ask(engine, "rslora")
    engine.step()
    assert (len(cold.output), len(running.output)) == (1, 2)
    assert running.token_times[1] - running.token_times[0] > 0.2


def test_async_admits_in_the_order_of_arrival(llama: World) -> None:
    """Loads of waiting requests go one after the other, the oldest first, and whoever needs none
    isn't held up.
    """
    engine = engine_of(llama, mode="async", link=CRAWLING)
    first, second = ask(engine, "rslora", 5), ask(engine, "odd", 5)
    base = ask(engine, None, 5)
    engine.run()
    assert base.token_times[0] < min(first.token_times[0], second.token_times[0])
    assert base.token_times[-1] < first.token_times[0]
    for name, request in (("rslora", first), ("odd", second), (None, base)):
        assert is_right(llama, request, name)


def test_layerwise_begins_before_the_last_layer_is_there(llama: World) -> None:
    engine = engine_of(llama, mode="layerwise", link=CRAWLING)
    request = ask(engine, "rslora")
    arrived = request.ticket.num_arrived
    engine.step()  # alone, so it needn't wait
    assert arrived < 3 and len(request.output) == 1
    assert engine.stats().stall_seconds > 0.1
    assert list(request) == llama.greedy("rslora", request.prompt, COUNT)


@pytest.mark.parametrize(("max_stall_ms", "stalls"), [(0.0, False), (1e6, True)])
def test_the_bound_decides_whether_others_stall(
    llama: World, max_stall_ms: float, stalls: bool
) -> None:
    engine = engine_of(llama, mode="layerwise", link=CRAWLING, max_stall_ms=max_stall_ms)
    base = ask(engine, "attention", 5, 200)  # its load tells the link's rate
    engine.step()
    cold = ask(engine, "rslora")
    before = engine.stats().stall_seconds
    engine.step()
    assert bool(cold.output) == stalls
    while not cold.output:
        engine.step()
    assert (engine.stats().stall_seconds - before > 0.1) == stalls
    engine.run()
    assert is_right(llama, base, "attention") and is_right(llama, cold, "rslora")


@pytest.mark.parametrize("mode", PREFETCHING)
def test_abort_cancels_a_load_that_nobody_else_wants(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, link=CRAWLING)
    base = ask(engine, None, 5, 30)
    engine.step()
    lonely, wanted, also = ask(engine, "rslora"), ask(engine, "odd"), ask(engine, "odd")
    tickets = lonely.ticket, wanted.ticket
    lonely.abort()
    wanted.abort()
    assert (lonely.slot, lonely.ticket) == (-1, None)
    assert tickets[0].status == "cancelled"
    check_books(engine)
    run_checked(engine)
    assert engine.stats().cancelled_loads == 1
    assert is_right(llama, base, None) and is_right(llama, also, "odd")
    again = ask(engine, "rslora")  # what has arrived is of no harm
    assert list(again) == llama.greedy("rslora", again.prompt, COUNT)


@pytest.mark.parametrize("mode", PREFETCHING)
def test_replaced_while_loading(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, link=CRAWLING)
    old = ask(engine, "odd")
    engine.add_adapter("odd", llama.path("rslora"))
    new = ask(engine, "odd")
    engine.step()
    engine.remove_adapter("odd")
    run_checked(engine)
    assert is_right(llama, old, "odd") and is_right(llama, new, "rslora")


@pytest.mark.parametrize("mode", PREFETCHING)
def test_more_waiting_requests_than_slots(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, max_slots=2, max_running=3)
    asked = [(name, ask(engine, name)) for name in ADAPTERS for _ in range(2)]
    waiting = engine._scheduler.waiting
    assert [r.slot >= 0 for r in waiting] == [True] * 4 + [False] * 6
    run_checked(engine)
    assert all(is_right(llama, r, name) for name, r in asked)


@pytest.mark.parametrize("mode", PREFETCHING)
def test_an_older_request_takes_a_slot_from_a_waiting_younger_one(llama: World, mode: str) -> None:
    """An older one may come to the queue later: preempted, or its files took long to read."""
    engine = engine_of(llama, mode=mode, max_slots=1, link=CRAWLING)
    base = ask(engine, None, 5, 60)
    engine.step()
    fetched, fetch = Future(), engine._library.fetch
    engine._library.fetch = lambda *_: fetched
    older = ask(engine, "odd")
    engine._library.fetch = fetch
    younger = ask(engine, "rslora")
    engine.step()
    assert older.slot < 0 <= younger.slot and younger.ticket is not None
    fetched.set_result(engine._library.image("odd"))
    while older.slot < 0:
        engine.step()
        check_books(engine)
    assert younger.slot < 0
    run_checked(engine)
    assert older.token_times[0] < younger.token_times[0]
    assert is_right(llama, older, "odd") and is_right(llama, younger, "rslora")
    assert is_right(llama, base, None)


@pytest.mark.parametrize("mode", LOADING)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_load_that_fails_ends_its_requests_alone(llama: World, mode: str, layer: int) -> None:
    engine = engine_of(llama, mode=mode)
    faults = FaultyLoader(engine)
    base, good = ask(engine, None, 5, 30), ask(engine, "odd", 5, 30)
    while not good.output:
        engine.step()
    faults.at = layer
    bad = [ask(engine, "rslora") for _ in range(2)]
    before = len(good.output)
    while not all(r.finished for r in bad):
        engine.step()
        check_books(engine)
    assert engine.stats().preemptions == 0 and engine.stats().running == 2
    assert len(good.output) >= before and good.num_computed >= 4 + before
    for request in bad:
        assert (request.finish_reason, request.output) == ("error", [])
        with pytest.raises(RequestFailedError, match="can't be loaded: .*planted"):
            list(request)
    faults.at = None
    again = ask(engine, "rslora")
    run_checked(engine)
    assert is_right(llama, base, None) and is_right(llama, good, "odd")
    assert is_right(llama, again, "rslora")


@pytest.mark.parametrize("mode", LOADING)
def test_a_load_that_cannot_begin(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode)
    faults = FaultyLoader(engine)
    faults.refuses = True
    bad, base = ask(engine, "rslora"), ask(engine, None)
    ended = []
    while not base.finished:
        ended += engine.step()
    assert bad in ended and bad.finish_reason == "error" and "planted" in bad.error
    assert is_right(llama, base, None)
    faults.refuses = False
    assert len(list(ask(engine, "rslora"))) == COUNT
    check_empty(engine)


def test_cached_mode_reports_a_failed_load_where_it_is_added(llama: World) -> None:
    engine = toppings.Engine(make_model("llama"), mode="cached", link=FAST)
    engine.add_adapter("x", llama.path("odd"))
    faults = FaultyLoader(engine)
    engine._cached._loader = faults
    faults.at = 1
    with pytest.raises(DeviceError, match="planted"):
        engine.add_adapter("x", llama.path("rslora"))
    check_books(engine)
    assert len(request := list(ask(engine, "x"))) == COUNT
    assert request == llama.greedy("odd", prompt_of(7), COUNT)


@pytest.mark.parametrize("mode", ["blocking", *PREFETCHING])
def test_requests_wait_for_files_being_read(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode)
    fetched: list[Future] = [Future(), Future()]
    fetch, engine._library.fetch = engine._library.fetch, lambda *_: fetched[len(asked)]
    asked: list[Request] = []
    for _ in range(2):
        asked.append(ask(engine, "odd"))
    engine._library.fetch = fetch
    base = ask(engine, None)
    assert list(base) == llama.greedy(None, base.prompt, COUNT)  # not kept waiting
    engine.step()
    assert engine.stats().waiting == 2
    fetched[0].set_result(engine._library.image("odd"))
    fetched[1].set_exception(toppings.ToppingsError("expected a file, got none"))
    assert list(asked[0]) == llama.greedy("odd", asked[0].prompt, COUNT)
    with pytest.raises(RequestFailedError, match="can't be read: expected a file, got none"):
        list(asked[1])
    check_empty(engine)


@pytest.mark.parametrize("mode", PREFETCHING)
def test_nothing_spins_while_all_wait(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, link=CRAWLING)
    if mode == "layerwise":  # whose lonely request waits inside its pass; this one for its files
        fetched, image = Future(), engine._library.image("odd")
        engine._library.fetch = lambda *_: fetched
        threading.Timer(0.3, fetched.set_result, [image]).start()
    request = ask(engine, "rslora")
    start, used, steps = time.perf_counter(), time.thread_time(), 0
    while not request.output and engine.stats().running == 0:
        engine.step()
        steps += 1
    waited, used = time.perf_counter() - start, time.thread_time() - used
    assert waited > 0.2 and steps < 1500 * waited
    assert used < 0.3 * waited
    request.abort()


@pytest.mark.parametrize("mode", PREFETCHING)
def test_submit_and_abort_do_not_wait_for_a_pass(llama: World, mode: str) -> None:
    """So a load begins while the pass before it is under way."""
    engine = engine_of(llama, mode=mode)
    begun, go_on = threading.Event(), threading.Event()
    forward = engine._runner.forward

    def held(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return forward(*args)

    running, ended = ask(engine, "odd"), ask(engine, None)
    eventually(lambda: running.ticket.status == "loaded")
    engine._runner.forward = held
    stepper = threading.Thread(target=engine.step)
    stepper.start()
    try:
        assert begun.wait(30)
        cold = ask(engine, "rslora")
        eventually(lambda: cold.ticket.status == "loaded")
        blocks = list(ended.blocks)
        ended.abort()  # keeps its blocks until the pass has ended
        assert ended.finish_reason == "abort" and ended.blocks == blocks != []
    finally:
        go_on.set()
        stepper.join(30)
    engine._runner.forward = forward
    assert ended.output == [] and ended.blocks == []
    assert (len(running.output), engine.stats().running) == (1, 1)
    run_checked(engine)
    assert is_right(llama, running, "odd") and is_right(llama, cold, "rslora")


@pytest.mark.parametrize("mode", LOADING)
def test_threads_over_a_slow_link(llama: World, mode: str) -> None:
    engine = engine_of(llama, mode=mode, max_slots=2, max_running=5)
    results: dict[int, tuple[str | None, list[int]]] = {}

    def work(i: int) -> None:
        name = TENANTS[i % len(TENANTS)]
        request = ask(engine, name, 5)
        if i % 5 == 4:
            request.abort()
        results[i] = name, list(request)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for i, (name, tokens) in results.items():
        expected = llama.greedy(name, prompt_of(5), COUNT)
        assert tokens == (expected[: len(tokens)] if i % 5 == 4 else expected)
    check_empty(engine)


@pytest.mark.parametrize("count", [1, COUNT])
def test_requests_that_have_ended_keep_no_adapter_in_the_store(llama: World, count: int) -> None:
    """A budget for two of three: evicted ones are read again while their request waits."""
    engine = toppings.Engine(make_model("llama"), host_bytes=230_000, max_slots=1, link=FAST)
    names = ["odd", "rslora", "patterns"]
    kept = []
    for _ in range(3):
        for name in names:
            if name not in engine.adapters():
                engine.add_adapter(name, llama.path(name))
            kept.append((name, ask(engine, name, count=count)))
            engine.run()
    assert all(is_right(llama, r, name) for name, r in kept)
    assert engine._library._store.stats().evictions > 2


@pytest.mark.parametrize("mode", LOADING)
def test_a_pass_keeps_no_adapter_in_the_store(llama: World, mode: str) -> None:
    """Also not the last one, which waited for the load."""
    engine = toppings.Engine(make_model("llama"), mode=mode, link=FAST)
    store = engine._library._store
    for fails in (False, True):
        engine.add_adapter("odd", llama.path("odd"))
        request = ask(engine, "odd", count=1)
        if fails:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine._runner.model.lm_head, "forward", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    while True:
                        engine.step()
            request.abort()
        else:
            engine.run()
            assert is_right(llama, request, "odd")
        engine.remove_adapter("odd")
        eventually(lambda: store.stats().used_bytes == 0)


def test_an_aborted_request_ends_its_read(llama: World) -> None:
    """Else it would keep others from the store's room that it waits for."""
    engine = toppings.Engine(make_model("llama"), host_bytes=170_000)
    engine.add_adapter("rslora", llama.path("rslora"))
    engine.add_adapter("odd", toppings.read_adapter(llama.path("odd")))  # in place of it, for good
    first, second = ask(engine, "rslora"), ask(engine, "rslora")
    read = first.fetched
    assert read is not None and second.fetched is read
    first.abort()
    with pytest.raises(TimeoutError):
        read.result(0.5)
    second.abort()
    with pytest.raises(CancelledError):
        read.result(20)
    check_empty(engine)
