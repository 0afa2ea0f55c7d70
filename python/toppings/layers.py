# SPDX-License-Identifier: Apache-2.0
"""LoRA inside a Hugging Face decoder: every targeted ``nn.Linear`` also computes its batch's
adapters.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from toppings import ops  # noqa: F401  (registers torch.ops.toppings)
from toppings._runtime import Ticket
from toppings.errors import UnsupportedModelError

__all__ = ["LoraLinear", "LoraSite", "LoraStep"]


@dataclass
class LoraStep:
    """Who uses which slot in the coming forward pass, and what is still on its way there; shared by
    all layers of one model.
    """

    token_slots: torch.Tensor | None = None  # int32 [T]; None: no token has an adapter
    plan: torch.Tensor | None = None
    max_rank: int = 512
    tickets: Sequence[Ticket] = ()  # loads under way of slots that the pass uses
    stream: int = 0  # a cudaStream_t; 0 on the host
    stall_seconds: float = 0.0  # that the host has waited in await_layer, over all passes
    _awaited: int = -1

    def begin(self, tickets: Sequence[Ticket], stream: int) -> None:
        self.tickets, self.stream, self._awaited = tickets, stream, -1

    def end(self) -> None:
        """A ticket keeps its image in use."""
        self.tickets = ()

    def await_layer(self, layer: int) -> None:
        """What the stream runs from now on finds the layer's adapters there. Raises what made a
        load fail.
        """
        if not self.tickets or layer == self._awaited:
            return
        start = time.perf_counter()
        for ticket in self.tickets:
            ticket.wait(layer, self.stream)
        self.stall_seconds += time.perf_counter() - start
        self._awaited = layer


@dataclass
class LoraSite:
    """Linears with one input: ``y = x Wᵀ + bias``, then every token's adapter on top, in one
    operator.

    The first linear that is called computes all of them; its siblings, called with the very same
    tensor, take their part.
    """

    layer: int
    weight: torch.Tensor  # [ΣN, K]
    bias: torch.Tensor | None  # [ΣN]
    widths: list[int]
    # 1-D: the layer's adapters. In place, all addresses of a store, most of them never touched: it
    # must not be printed or copied.
    arena: torch.Tensor = field(repr=False)
    slots: torch.Tensor = field(repr=False)  # int64 [S, L, 3]
    scales: torch.Tensor = field(repr=False)  # float32 [S, L]
    step: LoraStep = field(repr=False)
    _input: torch.Tensor | None = field(default=None, repr=False)
    _version: int = 0
    _parts: list[torch.Tensor | None] = field(default_factory=list, repr=False)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedModelError(
            "model: expected one that isn't attached, got a copy of one whose adapters lie in an"
            " arena; detach it first"
        )

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if len(self.widths) == 1:
            return self._compute(x)
        version = 0 if x.is_inference() else x._version
        if self._input is not x or self._version != version or self._parts[index] is None:
            self._input, self._version = x, version
            self._parts = list(self._compute(x).split(self.widths, dim=-1))
        part = self._parts[index]
        if part is None:
            raise RuntimeError("unreachable: the part was computed above")
        self._parts[index] = None
        if not any(p is not None for p in self._parts):
            self._input = None
        return part

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        step = self.step
        if step.token_slots is None:
            return y
        if y.requires_grad:
            raise UnsupportedModelError(
                "LoRA layers: expected no autograd (torch.inference_mode() or no_grad()),"
                " got a differentiable input"
            )
        step.await_layer(self.layer)
        rows = y.view(-1, y.shape[-1])
        torch.ops.toppings.lora_forward_(
            rows,
            x.reshape(-1, x.shape[-1]),
            self.arena,
            self.arena,
            self.slots,
            self.scales,
            step.token_slots,
            self.widths,
            step.plan,
            step.max_rank,
        )
        return y


class LoraLinear(nn.Linear):
    """An ``nn.Linear`` whose output includes its tokens' adapters. Same parameters, same names."""

    def __init__(self, linear: nn.Linear, site: LoraSite, index: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.site, self.index = site, index

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.site.output(input, self.index)
