# SPDX-License-Identifier: Apache-2.0
"""The base model of the engine's cases, seeded adapters for it, and an engine that serves them."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import toppings
from loading.rig import Cores
from loading.rounds import on_core
from toppings._runtime import Device

ROOT = Path(__file__).resolve().parents[2]
SCALE = 0.02
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Base:
    """A model, of which every engine gets a copy: an attached model belongs to one engine."""

    name: str
    model: Any
    seed: int

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    def linears(self) -> dict[str, nn.Linear]:
        """Of the decoder's layers, by path."""
        return {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in path
        }

    def layer_bytes(self, rank: int) -> int:
        rows = sum(x.in_features + x.out_features for x in self.linears().values())
        return rank * rows * DTYPE.itemsize // self.layers

    def prompt(self, length: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(
            0, self.model.config.vocab_size, (length,), generator=generator
        ).tolist()

    def adapter(self, rank: int, number: int) -> toppings.Adapter:
        """All of one seed and rank differ."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * SCALE).to(DTYPE)

        return toppings.Adapter.from_tensors(
            {
                path: (draw(rank, x.in_features), draw(x.out_features, rank), 1.0)
                for path, x in self.linears().items()
            }
        )


def load_smollm2(seed: int) -> Base:
    """Raises FileNotFoundError or ModuleNotFoundError where it can't be had."""
    sys.path.append(str(ROOT / "examples"))
    from transformers.utils import logging

    from smollm2 import NAME, load_smollm2

    logging.disable_progress_bar()
    model, _ = load_smollm2(DTYPE)
    return Base(NAME, model, seed)


def random_llama(seed: int, device: str, **sizes: int) -> Base:
    """Untrained: what a pass costs doesn't depend on the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes)
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(DTYPE).eval()
    return Base(f"untrained Llama ({config.num_hidden_layers} × {config.hidden_size})", model, seed)


BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


class Server:
    """An engine in one mode, with adapters of one rank that take turns."""

    def __init__(
        self,
        base: Base,
        mode: str,
        device: Device,
        cores: Cores,
        rank: int,
        adapters: int,
        room: int,
        **options: Any,
    ) -> None:
        """room: adapters that the arena holds; fewer than adapters, those in turn are cold."""
        with on_core(cores.link):  # threads of a device without a link inherit it
            self.engine = toppings.Engine(
                copy.deepcopy(base.model),
                device=device,
                mode=mode,
                loader_cpu=cores.link,
                max_slots=room,
                max_rank=rank,
                arena_bytes=room * base.layer_bytes(rank) * base.layers,
                **options,
            )
        names = [f"{number}" for number in range(adapters)]
        for number, name in enumerate(names):
            self.engine.add_adapter(name, base.adapter(rank, number))
        self._turns = cycle(names)

    def next_name(self) -> str:
        return next(self._turns)

    def first_token(self, prompt: list[int], name: str) -> float:
        """Seconds from submit() until the request's only token is there."""
        params = toppings.SamplingParams(max_tokens=1, ignore_eos=True)
        start = perf_counter()
        request = self.engine.submit(prompt, params, name)
        while not request.finished:
            self.engine.step()
        seconds = perf_counter() - start
        if request.finish_reason != "length":
            raise RuntimeError(f"engine: expected a token, got {request.finish_reason}")
        return seconds

    def close(self) -> None:
        self.engine.close()
