# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, one packed forward pass at a time."""

import operator
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from toppings._runtime import HostStore, Image, load
from toppings.adapter import Adapter
from toppings.attachment import attach
from toppings.engine.batch import pack
from toppings.engine.kv_cache import BlockPool
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
from toppings.library import AdapterLibrary

__all__ = ["Engine", "EngineStats", "Mode"]

Mode = Literal["cached", "blocking"]


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, but for waiting, running and the free blocks, which are
    now.
    """

    steps: int
    tokens: int  # computed, prompt and output
    loads: int  # adapters copied into the arena
    preemptions: int
    waiting: int
    running: int
    free_kv_blocks: int


class Engine:
    """Serves one base model with many adapters: requests of any adapters and ranks share every
    forward pass.

    Args:
        model: a transformers decoder built from nn.Linear, on the CPU; put into eval mode and
            attached until close().
        device: "cpu".
        mode: how a cold adapter is handled. "blocking": it is copied into the arena when its first
            request is admitted. "cached": it is copied when added, and stays; adding or
            replacing one while no slot is free is an error.
        lora_dtype: dtype of adapters in memory, by default the model's.
        max_slots: adapters resident at once.
        max_rank: adapters of a larger rank are refused.
        arena_bytes: device memory for resident adapters; see :func:`toppings.attach`.
        host_bytes: budget of the host store, which holds every adapter added.
        kv_blocks, block_size: the KV cache, in blocks of so many token positions; memory is taken
            as blocks fill.
        max_running: requests in one pass.
        max_batch_tokens: tokens in one pass, more than max_running, so that prefill always goes on.

    Thread-safe: any thread may submit, abort, step, or iterate over a request.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        mode: Mode = "blocking",
        lora_dtype: torch.dtype | None = None,
        max_slots: int = 8,
        max_rank: int = 512,
        arena_bytes: int | None = None,
        host_bytes: int = 4 << 30,
        kv_blocks: int = 1024,
        block_size: int = 16,
        max_running: int = 64,
        max_batch_tokens: int = 512,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"model: expected a transformers model, got {type(model).__name__}"
            )
        if device != "cpu" or model.device.type != "cpu":
            raise InvalidArgumentError(
                f"device: expected 'cpu' and a model there, got {device!r}, {model.device}"
            )
        if mode not in get_args(Mode):
            raise InvalidArgumentError(
                f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}"
            )
        if max_running < 1 or max_batch_tokens <= max_running:
            raise InvalidArgumentError(
                "max_batch_tokens: expected more than max_running >= 1,"
                f" got {max_batch_tokens} and {max_running}"
            )
        self._pool = BlockPool(kv_blocks, block_size)
        store = HostStore(host_bytes)
        self._attached = attach(
            model.eval(),
            max_slots=max_slots,
            lora_dtype=lora_dtype,
            arena_bytes=arena_bytes,
            max_rank=max_rank,
        )
        try:
            self._runner = Runner(model, self._attached, kv_blocks, block_size)
        except BaseException:
            self._attached.detach()
            raise
        self._library = AdapterLibrary(
            store, self._attached.shape, self._attached.modules, self._attached.dtype, max_rank
        )
        self._scheduler = Scheduler(self._attached.slots, self._pool, max_running, max_batch_tokens)
        self._mode, self._eos = mode, _eos_tokens(model)
        self._cached: dict[str, int] = {}  # name -> the slot that mode "cached" pins for it
        self._closed = False
        self._retired: list[int] = []  # such slots of removed adapters that requests still need
        self._ids = count()
        self._steps = self._tokens = self._loads = self._preemptions = 0
        self._lock = threading.RLock()

    # Adapters

    def adapters(self) -> list[str]:
        return self._library.names()

    def add_adapter(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Reads an adapter (PEFT folder or Adapter) and makes it available to new requests under a
        name.

        A name that exists is replaced: requests submitted before keep the adapter they were
        submitted with. Nothing changes when it fails; the errors are those of
        :meth:`AdapterLibrary.add`.
        """
        # Slow, and needs no lock: the engine goes on meanwhile.
        prepared = self._library.prepare(name, adapter)
        size, room = prepared.image.layout.max_layer_bytes, self._attached.arena.bytes_per_layer
        if size > room:
            raise AdapterMismatchError(
                f"adapter {name!r}: expected at most {room} bytes per layer (arena_bytes),"
                f" got {size}"
            )
        with self._lock:
            self._release_retired()
            slot = self._pin(prepared.image) if self._mode == "cached" else None
            self._library.commit(name, prepared)
            self._unpin(name)
            if slot is not None:
                self._cached[name] = slot

    def remove_adapter(self, name: str) -> None:
        """New requests can't name it any more; those submitted before run to their end."""
        with self._lock:
            self._library.remove(name)
            self._unpin(name)

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
            if self._closed:
                raise InvalidRequestError("engine: expected an open one, got one that was closed")
            image = None if adapter is None else self._library.image(adapter)
            request = Request(
                next(self._ids), prompt, params, adapter, image, self.step, self.abort
            )
            self._scheduler.add(request)
            return request

    def abort(self, request: Request) -> None:
        """Ends a request now; does nothing once it has finished."""
        with self._lock:
            if not request.finished:
                self._scheduler.remove(request)
                request.finish_reason = "abort"

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def step(self) -> list[Request]:
        """One forward pass; the requests that got a token or ended. Empty when there is nothing to
        do.

        Should it fail, every request of the pass is back in the queue, to be computed again, and
        the error is raised.
        """
        with self._lock:
            schedule = self._scheduler.schedule()
            self._preemptions += schedule.num_preempted
            if not schedule.chunks:
                return []
            try:
                for slot in schedule.loads:
                    load(self._attached.slots, slot)
                return self._run(schedule)
            except BaseException:
                for request in schedule.chunks:
                    if not request.finished:
                        self._scheduler.preempt(request)
                raise

    def run(self) -> None:
        """Steps until no request is left."""
        while self.has_work:
            self.step()

    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                steps=self._steps,
                tokens=self._tokens,
                loads=self._loads,
                preemptions=self._preemptions,
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                free_kv_blocks=self._pool.num_free,
            )

    def close(self) -> None:
        """Aborts what is left and gives the model its own layers and attention back."""
        with self._lock:
            self._closed = True
            for request in [*self._scheduler.running, *self._scheduler.waiting]:
                self.abort(request)
            self._runner.close()
            self._attached.detach()

    def _run(self, schedule: Schedule) -> list[Request]:
        """The pass itself; requests whose last known token was computed get their next one."""
        chunks = schedule.chunks
        batch = pack(list(chunks.values()), self._pool.block_size)
        complete = [r.num_computed + len(c.tokens) == r.num_tokens for r, c in chunks.items()]
        due = [r for r, done in zip(chunks, complete, strict=True) if done]
        logits = self._runner.forward(batch, batch.last_rows[torch.tensor(complete)])
        finite = torch.isfinite(logits.amax(-1)).tolist()
        good = [i for i, ok in enumerate(finite) if ok]
        tokens = sample(
            logits[good], [due[i].params for i in good], [due[i].generator for i in good]
        )

        # From here on nothing can fail: a pass is taken over as a whole.
        self._steps += 1
        self._tokens += len(batch.tokens)
        self._loads += len(schedule.loads)
        for request, chunk in chunks.items():
            request.num_computed += len(chunk.tokens)
        for i, token in zip(good, tokens, strict=True):
            due[i].append(token, self._eos)
        for request, ok in zip(due, finite, strict=True):
            if not ok:
                # The reason first: who iterates in another thread reads it once this has finished.
                request.error = "its logits are not finite"
                request.finish_reason = "error"
            if request.finished:
                self._scheduler.remove(request)
        return due

    def _pin(self, image: Image) -> int:
        slot, resident = self._attached.slots.acquire(image)
        if not resident:
            load(self._attached.slots, slot)
            self._loads += 1
        return slot

    def _unpin(self, name: str) -> None:
        slot = self._cached.pop(name, None)
        if slot is not None:
            self._retired.append(slot)
            self._release_retired()

    def _release_retired(self) -> None:
        """In mode "cached" a slot is never waited for, so a removed adapter keeps its own until the
        last request for it has ended.
        """
        requests = [*self._scheduler.running, *self._scheduler.waiting]
        needed = {r.image.digest for r in requests if r.image is not None}
        slots = self._attached.slots
        kept = [slot for slot in self._retired if any(slots.find(d) == slot for d in needed)]
        for slot in self._retired:
            if slot not in kept:
                slots.release(slot)
        self._retired = kept


def _eos_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Of the generation config, which is what the model's own generate() stops at."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
