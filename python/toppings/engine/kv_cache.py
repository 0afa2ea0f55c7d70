# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: fixed-size blocks of token positions, and who holds which."""

from collections import deque

import torch

from toppings.errors import CapacityError, InvalidArgumentError

__all__ = ["NULL_BLOCK", "BlockPool", "KvCache"]

NULL_BLOCK = 0  # never handed out; pads block tables, so it only ever holds zeros


class BlockPool:
    """Free KV blocks. Ids run from 1; block 0 is the null block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvalidArgumentError(
                f"kv_blocks, block_size: expected at least 1, got {num_blocks} and {block_size}"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        if not self.can_allocate(count):
            raise CapacityError(f"KV blocks: expected {count} free ones, got {len(self._free)}")
        return [self._free.popleft() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        self._free.extend(blocks)


class KvCache:
    """Keys and values of all layers: per layer k and v, [num_blocks + 2, block_size, heads,
    head_dim].

    Behind the pool's blocks lies one more, ``scratch``, which takes what padding computes. A
    layer's tensors are made at its first use, by the shape of the keys it brings (models may differ
    by layer); on the host the system zeroes them lazily, so that memory is taken as blocks fill.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.scratch = num_blocks + 1
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(
        self, index: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v of one layer; key and value [tokens, heads, head_dim] give the shapes."""
        found = self.layers.get(index)
        if found is None:
            found = self._make(key), self._make(value)
            self.layers[index] = found
        return found

    def _make(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.num_blocks + 2, self.block_size, *like.shape[1:])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
