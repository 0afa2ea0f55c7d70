# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one packed forward pass at a time."""

import operator
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import get_args

import torch
from transformers import PreTrainedModel

from toppings._runtime import Device, HostStore
from toppings.adapter import Adapter
from toppings.attachment import attach
from toppings.engine.arguments import check_int, check_number
from toppings.engine.batch import pack
from toppings.engine.cached import CachedSlots
from toppings.engine.device import Link, open_device
from toppings.engine.kv_cache import BlockPool
from toppings.engine.loading import Loading, Mode, load_error, pause
from toppings.engine.request import Request
from toppings.engine.runner import Runner
from toppings.engine.sampling import SamplingParams, sample
from toppings.engine.scheduler import Schedule, Scheduler
from toppings.errors import (
    AdapterMismatchError,
    InvalidArgumentError,
    InvalidRequestError,
    UnsupportedModelError,
)
from toppings.library import AdapterLibrary, PreparedAdapter

__all__ = ["Engine", "EngineStats"]

READ_PATIENCE_SECONDS = 30.0  # that a request waits for room in the host store


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, but for waiting, running and the free blocks, which are
    now.
    """

    device: str  # with an emulated link it says so
    steps: int
    tokens: int  # computed, prompt and output
    loads: int  # of adapters into the arena, begun
    prefetches: int  # of those, for waiting requests
    cancelled_loads: int
    failed_loads: int
    loaded_bytes: int
    stall_seconds: float  # that the host has waited for adapters of the pass at hand
    preemptions: int
    waiting: int
    running: int
    free_kv_blocks: int


class Engine:
    """Serves one base model with many adapters: requests of any adapters and ranks share every
    forward pass.

    Args:
        model: a transformers decoder built from nn.Linear, on the device; put into eval mode and
            attached until close().
        device: "cpu", "cuda", "cuda:<index>", or a Device.
        link: with device "cpu", an emulated link to an arena in main memory, for measurements.
            Without one, adapters are used where their images lie and nothing is loaded at all.
        mode: how a cold adapter is handled. "layerwise": it is loaded from the moment its request
            is queued, and every layer of the request's first pass waits for its own part. "async":
            loaded from then on, too, and its request waits until all of it is there. "blocking":
            loaded when its first request is admitted, while everybody waits. "cached": loaded when
            added, and it stays; adding or replacing one while no slot is free is an error.
        max_stall_ms: "layerwise": a pass that others take part in is expected to wait for layers no
            longer than this. An estimate, from the link's measured rate.
        loader_cpu: the core that the loader's thread is pinned to; -1: none. The engine itself uses
            torch's threads as they are (torch.set_num_threads): keep them off that core, and off
            that of an emulated link.
        lora_dtype: dtype of adapters in memory, by default the model's.
        max_slots: adapters resident at once.
        max_rank: adapters of a larger rank are refused.
        arena_bytes: device memory for resident adapters; see :func:`toppings.attach`.
        host_bytes: budget of the host store. It keeps the adapters in use and those made in memory;
            others make room for each other, and are read from their files again when next needed.
        kv_blocks, block_size: the KV cache, in blocks of so many token positions; on the CPU memory
            is taken as blocks fill, on a GPU at once.
        max_running: requests in one pass.
        max_batch_tokens: tokens in one pass, more than max_running, so that prefill always goes on.
        cuda_graphs: on a GPU, passes that only decode are captured into CUDA graphs at their first
            use, by powers of two of requests and of context, and replayed.

    Thread-safe: any thread may submit, abort, step, or iterate over a request. Submitting and
    aborting don't wait for a pass under way.

    ``with Engine(...) as engine:`` closes it at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: str | Device = "cpu",
        link: Link | None = None,
        mode: Mode = "layerwise",
        max_stall_ms: float = 2.0,
        loader_cpu: int = -1,
        lora_dtype: torch.dtype | None = None,
        max_slots: int = 8,
        max_rank: int = 512,
        arena_bytes: int | None = None,
        host_bytes: int = 4 << 30,
        kv_blocks: int = 1024,
        block_size: int = 16,
        max_running: int = 64,
        max_batch_tokens: int = 512,
        cuda_graphs: bool = True,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"model: expected a transformers model, got {type(model).__name__}"
            )
        if mode not in get_args(Mode):
            raise InvalidArgumentError(
                f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}"
            )
        for name, value in (
            ("loader_cpu", loader_cpu),
            ("max_slots", max_slots),
            ("max_rank", max_rank),
            ("kv_blocks", kv_blocks),
            ("block_size", block_size),
            ("max_running", max_running),
            ("max_batch_tokens", max_batch_tokens),
        ):
            check_int(name, value)
        check_int("host_bytes", host_bytes, bits=64)
        if arena_bytes is not None:
            check_int("arena_bytes", arena_bytes, bits=64)
        check_number("max_stall_ms", max_stall_ms)
        if not max_stall_ms >= 0:
            raise InvalidArgumentError(f"max_stall_ms: expected at least 0, got {max_stall_ms}")
        if max_running < 1 or max_batch_tokens <= max_running:
            raise InvalidArgumentError(
                "max_batch_tokens: expected more than max_running >= 1,"
                f" got {max_batch_tokens} and {max_running}"
            )
        self._pool = BlockPool(kv_blocks, block_size)
        place = open_device(device, link, model)
        store = HostStore(host_bytes, place)
        self._attached = attach(
            model.eval(),
            device=place,
            store=store,
            max_slots=max_slots,
            lora_dtype=lora_dtype,
            arena_bytes=arena_bytes,
            max_rank=max_rank,
            loader_cpu=loader_cpu,
        )
        try:
            self._runner = Runner(
                model, self._attached, kv_blocks, block_size, max_running if cuda_graphs else 0
            )
        except BaseException:
            self._attached.detach()
            raise
        self._library = AdapterLibrary(
            store, self._attached.shape, self._attached.modules, self._attached.dtype, max_rank
        )
        self._loading = Loading(self._attached, mode, max_stall_ms / 1e3)
        self._scheduler = Scheduler(self._loading, self._pool, max_running, max_batch_tokens)
        self._cached = CachedSlots(self._attached) if mode == "cached" else None
        self._eos = _eos_tokens(model)
        self._closed = self._detached = False
        self._ids = count()
        self._steps = self._tokens = self._preemptions = 0
        self._stall_seconds = 0.0
        # One pass at a time, under _turn; _lock is for the books and never held for long. Who holds
        # both took _turn first. Requests of the pass under way keep what they hold until its end.
        self._turn = threading.RLock()
        self._lock = threading.RLock()
        self._in_pass: frozenset[Request] = frozenset()

    # Adapters

    def adapters(self) -> list[str]:
        return self._library.names()

    def add_adapter(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Reads an adapter (a PEFT folder, a packed file, or an Adapter) and makes it available to
        new requests under a name.

        A name that exists is replaced: requests submitted before keep the adapter they were
        submitted with. Nothing changes when it fails; the errors are those of
        :meth:`AdapterLibrary.add`, and

        Raises:
            AdapterMismatchError: a layer of it is larger than the arena's.
            SlotsBusyError: in mode "cached", no slot is free.
            InvalidRequestError: the engine was closed.
        """
        self._check_open()
        # Slow, and needs no lock: the engine goes on meanwhile.
        prepared = self._library.prepare(name, adapter)
        try:
            self._add(name, prepared)
        except BaseException:
            self._library.discard(prepared)
            raise

    def _add(self, name: str, prepared: PreparedAdapter) -> None:
        size, room = prepared.image.layout.max_layer_bytes, self._attached.arena.bytes_per_layer
        if size > room:
            raise AdapterMismatchError(
                f"adapter {name!r}: expected at most {room} bytes per layer (arena_bytes),"
                f" got {size}"
            )
        if self._cached is None:
            with self._lock:
                self._check_open()
                self._library.commit(name, prepared)
            return
        with self._lock:
            self._check_open()
            self._cached.release_retired(self._requests())
            pinned = self._cached.pin(prepared.image)
        pinned.wait()  # while the engine goes on
        with self._lock:
            if self._closed:
                pinned.release()
                self._check_open()
            self._library.commit(name, prepared)
            self._cached.assign(name, pinned, self._requests())

    def remove_adapter(self, name: str) -> None:
        """New requests can't name it any more; those submitted before run to their end."""
        with self._lock:
            self._library.remove(name)
            if self._cached is not None:
                self._cached.forget(name, self._requests())

    # Requests

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Queues a request. adapter: a name that was added, or None for the base model.

        Raises:
            UnknownAdapterError: no adapter of that name.
            InvalidRequestError: an empty prompt, a token outside the vocabulary, or more tokens
                than the model's positions or the whole KV cache hold.
        """
        params = params or SamplingParams()
        try:
            prompt = [operator.index(t) for t in prompt_ids]
        except TypeError:
            raise InvalidRequestError("prompt: expected token ids, got something else") from None
        if not prompt:
            raise InvalidRequestError("prompt: expected at least one token, got none")
        bad = next((t for t in prompt if not 0 <= t < self._runner.vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"prompt: expected tokens in [0, {self._runner.vocab_size}), got {bad}"
            )
        limit = min(self._runner.max_positions, self._pool.num_blocks * self._pool.block_size)
        if len(prompt) + params.max_tokens > limit:
            raise InvalidRequestError(
                f"prompt + max_tokens: expected at most {limit} tokens (model, KV cache),"
                f" got {len(prompt)} + {params.max_tokens}"
            )
        with self._lock:
            self._check_open()
            fetched = (
                None if adapter is None else self._library.fetch(adapter, READ_PATIENCE_SECONDS)
            )
            request = Request(
                next(self._ids), prompt, params, adapter, fetched, self.step, self.abort
            )
            self._scheduler.add(request)
            self._scheduler.advance()
            return request

    def abort(self, request: Request) -> None:
        """Ends a request now; does nothing once it has finished."""
        with self._lock:
            if request.finished:
                return
            request.finish_reason = "abort"
            if request.fetched is not None:
                self._library.give_up(request.fetched)
            if request not in self._in_pass:
                self._scheduler.remove(request)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def step(self) -> list[Request]:
        """One forward pass; the requests that got a token or ended. Empty when there is nothing to
        do, or nothing yet: when all requests wait for their adapters, it waits for a moment.

        A request whose adapter can't be read or loaded ends with an error. Should a pass fail in
        another way, every request of it is back in the queue, to be computed again, and the error
        is raised.
        """
        with self._turn:
            with self._lock:
                schedule = self._scheduler.schedule()
                self._preemptions += schedule.num_preempted
                self._in_pass = frozenset(schedule.chunks)
                waiting = self._scheduler.waiting
                awaited = self._loading.next_arrival(waiting)
                idle = bool(waiting) and not schedule.chunks and not schedule.failed
            if schedule.chunks:
                return schedule.failed + self._run(schedule)
        if idle:
            pause(awaited)
        return schedule.failed

    def run(self) -> None:
        """Steps until no request is left."""
        while self.has_work:
            self.step()

    def stats(self) -> EngineStats:
        with self._lock:
            loader = self._attached.loader.stats()
            return EngineStats(
                device=self._attached.device.name,
                steps=self._steps,
                tokens=self._tokens,
                loads=loader.loads,
                prefetches=self._loading.num_prefetched,
                cancelled_loads=loader.cancelled,
                failed_loads=loader.failed,
                loaded_bytes=loader.bytes,
                stall_seconds=self._stall_seconds + self._attached.step.stall_seconds,
                preemptions=self._preemptions,
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                free_kv_blocks=self._pool.num_free,
            )

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"Engine({type(self._runner.model).__name__} on {stats.device},"
            f" mode={self._loading.mode!r}, {len(self.adapters())} adapters,"
            f" {stats.running} running, {stats.waiting} waiting)"
        )

    def close(self) -> None:
        """Aborts what is left, waits for reads under way, and gives the model its own layers and
        attention back. Does nothing once that is done.
        """
        with self._turn, self._lock:
            if self._detached:  # another engine may have the model since
                return
            self._closed = True
            for request in self._requests():
                self.abort(request)
            self._library.close()
            self._runner.close()
            self._attached.detach()
            self._detached = True

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError("engine: expected an open one, got one that was closed")

    def _requests(self) -> list[Request]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _run(self, schedule: Schedule) -> list[Request]:
        """The pass itself; requests whose last known token was computed get their next one."""
        chunks = schedule.chunks
        complete = [r.num_computed + len(c.tokens) == r.num_tokens for r, c in chunks.items()]
        due = [r for r, done in zip(chunks, complete, strict=True) if done]
        try:
            if not self._loading.gates:
                self._await_loads(schedule)
            logits = self._forward(schedule, complete)
            finite = torch.isfinite(logits.amax(-1)).tolist()
            good = [i for i, ok in enumerate(finite) if ok]
            tokens = sample(
                logits[good], [due[i].params for i in good], [due[i].generator for i in good]
            )
        except BaseException as error:
            failed = self._take_back(schedule)
            if failed and isinstance(error, Exception):
                return failed
            raise

        # From here on nothing can fail: a pass is taken over as a whole.
        with self._lock:
            self._in_pass = frozenset()
            self._steps += 1
            for request, chunk in chunks.items():
                self._tokens += len(chunk.tokens)
                request.num_computed += len(chunk.tokens)
            for i, token in zip(good, tokens, strict=True):
                if not due[i].finished:  # by an abort meanwhile
                    due[i].append(token, self._eos)
            for request, ok in zip(due, finite, strict=True):
                if not ok and not request.finished:
                    request.fail("its logits are not finite")
            for request in chunks:
                self._loading.drop_arrived(request)
                if request.finished:
                    self._scheduler.remove(request)
        return due

    def _await_loads(self, schedule: Schedule) -> None:
        """Mode "blocking": the engine stands still."""
        start = time.perf_counter()
        for request in schedule.chunks:
            if request.ticket is not None:
                request.ticket.wait_for_all()
                request.ticket = None
        self._stall_seconds += time.perf_counter() - start

    def _forward(self, schedule: Schedule, complete: list[bool]) -> torch.Tensor:
        batch = pack(list(schedule.chunks.values()), self._pool.block_size)
        tickets = {r.slot: r.ticket for r in schedule.chunks if r.ticket is not None}
        start = time.perf_counter()
        logits = self._runner.forward(
            batch, batch.last_rows[torch.tensor(complete)], tuple(tickets.values())
        )
        if not tickets and not batch.segments:
            self._loading.observe_decode(time.perf_counter() - start)
        return logits

    def _take_back(self, schedule: Schedule) -> list[Request]:
        """After a pass that failed. When loads failed, their requests end, and the others go on
        from where they were; else all of them are queued again.
        """
        self._runner.synchronize()
        with self._lock:
            self._in_pass = frozenset()
            failed = []
            for request in schedule.chunks:
                why = None if request.ticket is None else load_error(request.ticket)
                if why is not None and not request.finished:
                    request.fail(why)
                    failed.append(request)
            for request, chunk in schedule.chunks.items():
                if request.finished:
                    self._scheduler.remove(request)
                elif failed:
                    self._scheduler.undo(request, chunk)
                else:
                    self._scheduler.preempt(request)
            return failed


def _eos_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Of the generation config, which is what the model's own generate() stops at."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
