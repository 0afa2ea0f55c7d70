# SPDX-License-Identifier: Apache-2.0
"""One call of the operators as data: a Case, with its seed, makes the Inputs.

Whatever an operator must not touch is NaN: the columns beside x and y in their buffers, and the
storage between the blocks of weights, which lie in random order, at odd places or all aligned.
"""

from dataclasses import dataclass, fields, replace

import torch

import toppings.ops  # noqa: F401  registers torch.ops.toppings
from toppings import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 5e-3}  # of the norm, by the dtype of x
RANKS = (0, 1, 3, 8, 16, 64, 100, 256)

ops = torch.ops.toppings


@dataclass
class Inputs:
    y: torch.Tensor
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor
    token_slots: torch.Tensor
    widths: list[int]
    y_buffer: torch.Tensor  # y and the NaN around it

    def args(self, plan: torch.Tensor | None = None, max_rank: int = 512) -> tuple:
        args = [getattr(self, field.name) for field in fields(self)[:-1]]
        return (*args, plan, max_rank)

    def forward(self, plan: torch.Tensor | None = None, max_rank: int = 512) -> torch.Tensor:
        return ops.lora_forward(*self.args(plan, max_rank))

    def plan(self) -> torch.Tensor:
        return ops.lora_plan(self.token_slots, self.slots.shape[1])

    def expected(self) -> torch.Tensor:
        return reference.lora_forward(*self.args()[:8])

    def with_token_slots(self, token_slots: torch.Tensor) -> "Inputs":
        return replace(self, token_slots=token_slots.to(torch.int32))

    def rows(self, index: torch.Tensor) -> "Inputs":
        """The same with these tokens, in this order."""
        x, y = self.x[index], self.y[index]
        return replace(self, x=x, y=y, token_slots=self.token_slots[index], y_buffer=y)


@dataclass(frozen=True)
class Case:
    """Printed when a test fails: Case(...).make() gives the inputs back."""

    seed: int
    tokens: int
    width_in: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    ranks: tuple[int, ...] = RANKS
    users: str = "mixed"  # any slot or none; "skewed": nine tenths share one; "one": all share one
    absent: bool = False  # the second projection is absent from every other adapter
    strided: bool = True
    aligned: bool = False  # every row and block on 16 bytes, where all widths are multiples of 8
    y_scale: float = 1.0

    def on_16_bytes(self) -> "Case":
        """The same with widths rounded up and everything aligned: kernels read 16 bytes at once."""
        widths = tuple(-(-width // 8) * 8 for width in self.widths)
        return replace(self, width_in=-(-self.width_in // 8) * 8, widths=widths, aligned=True)

    def make(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def rows(columns: int, pad: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            buffer = torch.full((self.tokens, sum(pad) + columns), torch.nan, dtype=self.dtype)
            view = buffer[:, pad[0] : pad[0] + columns]
            view.copy_(randn(self.tokens, columns))
            return buffer, view

        pad = ((8, 8) if self.aligned else (3, 8)) if self.strided else (0, 0)
        _, x = rows(self.width_in, (0, 0) if self.aligned else pad)
        y_buffer, y = rows(sum(self.widths), pad)
        y *= self.y_scale
        a, b, slots = self._weights(generator)
        scales = randn(len(self.widths), len(self.ranks))
        token_slots = self._token_slots(generator)
        return Inputs(y, x, a, b, slots, scales, token_slots, [*self.widths], y_buffer)

    def _token_slots(self, generator: torch.Generator) -> torch.Tensor:
        count = len(self.ranks)
        slots = torch.randint(-1, count, (self.tokens,), generator=generator)
        if self.tokens >= 2 * count:  # every slot at least once, and -1
            order = torch.randperm(self.tokens, generator=generator)[: count + 1]
            slots[order] = torch.arange(-1, count)
        if self.users == "skewed":
            most = torch.rand(self.tokens, generator=generator) < 0.9
            slots[most] = self.seed % count
        if self.users == "one":
            slots[:] = self.seed % count
        return slots.to(torch.int32)

    def _weights(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """a, b, slots: all blocks in random order with gaps; one arena if a and b share a dtype."""
        blocks = []  # (projection, slot, 0 for A or 1 for B, rank, width)
        slots = torch.zeros(len(self.widths), len(self.ranks), 3, dtype=torch.int64)
        for s, width in enumerate(self.widths):
            for i, rank in enumerate(self.ranks):
                rank = 0 if self.absent and s == 1 and i % 2 == 0 else rank
                slots[s, i, 2] = rank
                blocks += [(s, i, 0, rank, self.width_in), (s, i, 1, rank, width)]
        storages: list[list[torch.Tensor]] = [[], []]
        sizes = [0, 0]
        shared = self.a_dtype == self.b_dtype
        for index in torch.randperm(len(blocks), generator=generator).tolist():
            s, i, side, rank, width = blocks[index]
            which = 0 if shared else side
            gap = int(torch.randint(0, 8, (1,), generator=generator))
            gap = gap % 2 * 8 if self.aligned else gap
            values = torch.randn(rank * width, generator=generator)
            values /= (self.width_in if side == 0 else max(rank, 1)) ** 0.5
            storages[which] += [torch.full((gap,), torch.nan), values]
            slots[s, i, side] = sizes[which] + gap
            sizes[which] += gap + values.numel()
        a = torch.cat([*storages[0], torch.full((5,), torch.nan)]).to(self.a_dtype)
        b = a if shared else torch.cat([*storages[1], torch.full((5,), torch.nan)]).to(self.b_dtype)
        return a, b, slots


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, of the Frobenius norms."""
    norm = want.norm().item()
    difference = (got.to(want.dtype) - want).norm().item()
    return difference / norm if norm > 0 else difference


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = torch.int32 if one.dtype == F32 else torch.int16
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
