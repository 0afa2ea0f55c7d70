# SPDX-License-Identifier: Apache-2.0
"""One forward pass: the tokens of many requests packed into a row, and where their keys and values
lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from toppings.engine.kv_cache import NULL_BLOCK

__all__ = ["Batch", "Chunk", "Segment", "pack"]


@dataclass(frozen=True)
class Chunk:
    """What one request adds to a pass: the tokens at positions [start, start + len(tokens))."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]  # its block table, covering all positions up to the chunk's end
    slot: int  # its adapter's slot, -1 for the base model
    new_blocks: Sequence[int] = ()  # those of `blocks` that it got for this pass


@dataclass(frozen=True)
class Segment:
    """A chunk of more than one token, in the packed row [row, row + length)."""

    row: int
    length: int
    context: int  # positions up to and including the chunk
    blocks: torch.Tensor  # int64 [ceil(context / block_size)]


@dataclass(frozen=True)
class Batch:
    """T packed tokens: the D chunks of one token (decoding) first, then the longer ones."""

    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    # int64 [T] where each token's key and value go: block * block_size + offset
    kv_index: torch.Tensor
    new_blocks: torch.Tensor  # int64: blocks that still hold another request's keys
    token_slots: torch.Tensor  # int32 [T]
    # int64 [chunks], on the host: each chunk's last token, in the order of the chunks given
    last_rows: torch.Tensor
    num_decode: int  # D
    decode_blocks: torch.Tensor  # int64 [D, B], padded with the null block
    decode_context: torch.Tensor  # int64 [D]
    segments: list[Segment]

    def to(self, device: torch.device) -> "Batch":
        """All but last_rows on the device, in one copy, which the host doesn't wait for."""
        if self.tokens.device == device:
            return self
        parts = [self.tokens, self.positions, self.kv_index, self.new_blocks, self.token_slots]
        parts += [self.decode_blocks, self.decode_context, *(s.blocks for s in self.segments)]
        flat = torch.cat([part.reshape(-1).long() for part in parts])
        moved = flat.pin_memory().to(device, non_blocking=True).split([p.numel() for p in parts])
        tokens, positions, kv_index, new_blocks, slots, decode_blocks, context, *blocks = moved
        return replace(
            self,
            tokens=tokens,
            positions=positions,
            kv_index=kv_index,
            new_blocks=new_blocks,
            token_slots=slots.int(),
            decode_blocks=decode_blocks.view(self.decode_blocks.shape),
            decode_context=context,
            segments=[
                replace(segment, blocks=part)
                for segment, part in zip(self.segments, blocks, strict=True)
            ],
        )


def pack(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """Packs chunks in any order; last_rows keeps the caller's order."""
    order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].tokens) > 1)
    tokens: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    slots: list[int] = []
    last = [0] * len(chunks)
    decode: list[Chunk] = []
    segments: list[Segment] = []
    for i in order:
        chunk = chunks[i]
        row, length, end = len(tokens), len(chunk.tokens), chunk.start + len(chunk.tokens)
        tokens.extend(chunk.tokens)
        positions.extend(range(chunk.start, end))
        kv_index.extend(
            chunk.blocks[p // block_size] * block_size + p % block_size
            for p in range(chunk.start, end)
        )
        slots.extend([chunk.slot] * length)
        last[i] = len(tokens) - 1
        if length == 1:
            decode.append(chunk)
        else:
            used = chunk.blocks[: -(-end // block_size)]
            segments.append(Segment(row, length, end, torch.tensor(used)))
    context = [c.start + 1 for c in decode]
    width = max((-(-n // block_size) for n in context), default=0)
    table = [[*c.blocks[:width], *[NULL_BLOCK] * (width - len(c.blocks))] for c in decode]
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        kv_index=torch.tensor(kv_index),
        new_blocks=torch.tensor([b for c in chunks for b in c.new_blocks], dtype=torch.int64),
        token_slots=torch.tensor(slots, dtype=torch.int32),
        last_rows=torch.tensor(last),
        num_decode=len(decode),
        decode_blocks=torch.tensor(table, dtype=torch.int64).view(len(decode), width),
        decode_context=torch.tensor(context, dtype=torch.int64),
        segments=segments,
    )
