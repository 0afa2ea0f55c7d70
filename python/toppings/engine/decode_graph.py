# SPDX-License-Identifier: Apache-2.0
"""Decode passes at a few fixed sizes, so that a CUDA graph can be captured once for each and
replayed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from toppings.engine.batch import Batch
from toppings.engine.kv_cache import NULL_BLOCK

__all__ = ["DecodeGraphs"]

WARM_UPS = 2  # before a capture: what allocates or initialises on first use has done so


@dataclass(frozen=True)
class _Size:
    rows: int  # decoding requests
    width: int  # blocks in a request's table


class _StaticBatch:
    """A decode batch of one size in memory that stays where it is, filled in one copy."""

    def __init__(self, size: _Size, scratch: int, block_size: int, device: torch.device) -> None:
        rows = size.rows
        counts = [rows] * 6 + [rows * size.width]
        # Rows of padding: token 0 at position 0, alone in the scratch block, without an adapter.
        padding = [0, 0, scratch * block_size, NULL_BLOCK, -1, 1]
        fill = [value for value in padding for _ in range(rows)]
        fill += ([scratch] + [NULL_BLOCK] * (size.width - 1)) * rows
        self._padded = torch.tensor(fill)
        self._staged = torch.empty_like(self._padded, pin_memory=device.type == "cuda")
        self._flat = torch.empty_like(self._padded, device=device)
        self._size, self._counts = size, counts
        tokens, positions, kv_index, new_blocks, self._slots, context, table = self._parts(
            self._flat
        )
        self.batch = Batch(
            tokens=tokens,
            positions=positions,
            kv_index=kv_index,
            new_blocks=new_blocks,
            token_slots=torch.empty(rows, dtype=torch.int32, device=device),
            last_rows=torch.arange(rows),
            num_decode=rows,
            decode_blocks=table.view(rows, size.width),
            decode_context=context,
            segments=[],
        )

    def fill(self, batch: Batch) -> None:
        """The last fill's pass must have ended: the copy from the host isn't waited for."""
        self._staged.copy_(self._padded)
        tokens, positions, kv_index, new_blocks, slots, context, table = self._parts(self._staged)
        rows, width = batch.decode_blocks.shape
        tokens[:rows], positions[:rows], kv_index[:rows] = (
            batch.tokens,
            batch.positions,
            batch.kv_index,
        )
        new_blocks[: batch.new_blocks.numel()] = batch.new_blocks
        slots[:rows], context[:rows] = batch.token_slots, batch.decode_context
        table = table.view(-1, self._size.width)
        table[:rows] = NULL_BLOCK
        table[:rows, :width] = batch.decode_blocks
        self._flat.copy_(self._staged, non_blocking=True)

    def take_slots(self) -> None:
        """The part of filling that runs on the device."""
        self.batch.token_slots.copy_(self._slots)

    def _parts(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: tuple[torch.Tensor, ...] = flat.split(self._counts)
        return parts


class DecodeGraphs:
    """Runs batches of single tokens, padded to powers of two in rows and in block-table width.

    compute: the pass over a batch on the device, without a look at its numbers from the host;
        logits [rows, V].
    device: on a CUDA device each size is captured at its first use and replayed from then on, all
        of them in one memory pool; elsewhere it is computed.
    """

    def __init__(
        self,
        compute: Callable[[Batch], torch.Tensor],
        max_rows: int,
        scratch: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._compute, self._max_rows, self._device = compute, max_rows, device
        self._scratch, self._block_size = scratch, block_size
        self._static: dict[_Size, tuple[_StaticBatch, Callable[[], torch.Tensor]]] = {}
        self._pool: Any = None  # torch's handle, made with the first graph

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(rows, width) in use so far."""
        return [(size.rows, size.width) for size in self._static]

    def takes(self, batch: Batch) -> bool:
        """Only rows that decode, and few enough new blocks: a row of decoding has one at most."""
        rows = batch.num_decode
        return (
            not batch.segments
            and 0 < rows <= self._max_rows
            and batch.new_blocks.numel() <= self._size_of(batch).rows
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [D, V] of a batch on the host. They are overwritten by the next call."""
        size = self._size_of(batch)
        found = self._static.get(size)
        if found is None:
            static = _StaticBatch(size, self._scratch, self._block_size, self._device)
            static.fill(batch)
            found = static, self._prepare(static)
            self._static[size] = found
        else:
            found[0].fill(batch)
        return found[1]()[: batch.num_decode]

    def _size_of(self, batch: Batch) -> _Size:
        rows, width = batch.decode_blocks.shape
        return _Size(min(_power_of_two(rows), self._max_rows), _power_of_two(width))

    def _prepare(self, static: _StaticBatch) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            static.take_slots()
            return self._compute(static.batch)

        return compute if self._device.type != "cuda" else self._capture(compute)

    def _capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
        stream.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The loader's thread goes on calling the driver meanwhile, which is no part of this.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
