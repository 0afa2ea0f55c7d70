# SPDX-License-Identifier: Apache-2.0
"""Runs the model on a packed batch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from toppings._runtime import Ticket
from toppings.attachment import AttachedModel
from toppings.engine.attention import NAME, PagedAttention
from toppings.engine.batch import Batch, Chunk, pack
from toppings.engine.decode_graph import DecodeGraphs
from toppings.engine.kv_cache import KvCache
from toppings.errors import UnsupportedModelError

__all__ = ["Runner"]

# Their frequencies depend on the longest sequence of a batch, so a request's logits would depend on
# its neighbours.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Enough to tell another kind of attention; the bounds are far above rounding, far below that.
PROBE_TOKENS = 24
PROBE_ERROR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class Runner:
    """One model with its adapters attached, and its KV cache. On a GPU, passes run in a stream of
    their own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attached: AttachedModel,
        kv_blocks: int,
        block_size: int,
        decode_rows: int = 0,
    ) -> None:
        """decode_rows: passes of up to so many rows that only decode run as CUDA graphs, on a GPU.

        Checks that the model computes over the paged KV cache what it computes by itself.

        Raises:
            UnsupportedModelError: a part of the model can't be served in packed batches.
        """
        config = model.config.get_text_config()
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError("model: expected a decoder, got an encoder-decoder")
        for kind in _rope_types(getattr(config, "rope_parameters", None)):
            if kind in BATCH_DEPENDENT_ROPE:
                raise UnsupportedModelError(
                    f"rope type: expected one that depends on positions alone, got {kind!r}"
                )
        unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
        if unknown:
            raise UnsupportedModelError(
                f"layer types: expected full and sliding attention, got {sorted(unknown)}"
            )
        self.attached, self.model, self.device = attached, model, model.device
        self._stream = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # whatever made the model
            self._stream = torch.cuda.Stream(self.device)
        self.cache = KvCache(kv_blocks, block_size)
        self.decode: DecodeGraphs | None = None
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = getattr(config, "max_position_embeddings", 2**31)
        self._attention = str(model.config._attn_implementation)
        probe = list(range(min(PROBE_TOKENS, kv_blocks * block_size, self.max_positions)))
        probe = [token % self.vocab_size for token in probe]
        try:
            self._check_attention(probe, config.num_hidden_layers)
        except BaseException as error:
            self.close()
            if isinstance(error, UnsupportedModelError) or not isinstance(error, Exception):
                raise
            raise UnsupportedModelError(
                "model: expected one that runs over the paged attention,"
                f" got {type(error).__name__}: {error}"
            ) from error
        if self._stream is not None and decode_rows:
            self.decode = self.padded_decode(decode_rows)

    def padded_decode(self, max_rows: int) -> DecodeGraphs:
        return DecodeGraphs(
            self._compute, max_rows, self.cache.scratch, self.cache.block_size, self.device
        )

    @torch.inference_mode()
    def _check_attention(self, probe: list[int], num_layers: int) -> None:
        """Compares a few tokens, in pieces over the paged cache, with the model's own attention.

        A model whose attention is more than what its arguments tell would be served wrongly without
        a sign of it.
        """
        ids = torch.tensor([probe], device=self.device)
        with self._on_stream():
            expected = self.model(input_ids=ids, use_cache=False).logits[0, -1].cpu()
        self.model.set_attn_implementation(NAME)
        size = self.cache.block_size
        blocks = list(range(1, 1 + -(-len(probe) // size)))
        half, last = len(probe) // 2, len(probe) - 1
        found = expected
        for start, stop in ((0, half), (half, last), (last, len(probe))):
            if start < stop:
                new = blocks if start == 0 else ()
                found = self.forward(
                    pack([Chunk(probe[start:stop], start, blocks, -1, new)], size)
                )[-1]
        missing = set(range(num_layers)) - set(self.cache.layers)
        if missing:
            raise UnsupportedModelError(
                f"layers {sorted(missing)}: expected attention with its own keys and values,"
                " got none"
            )
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        bound = PROBE_ERROR[expected.dtype]
        if not error <= bound:
            raise UnsupportedModelError(
                f"model: expected its own logits from paged attention, got an error of {error:.2g}"
            )

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        rows: torch.Tensor | None = None,
        tickets: Sequence[Ticket] = (),
    ) -> torch.Tensor:
        """Logits [R, V], on the host, of the packed rows given (int64 [R]), of all T by default.
        Fills the KV cache.

        tickets: of loads under way that the pass needs; each layer waits for its part of them.
        """
        try:
            with self._on_stream():
                self.attached.begin_pass(tickets)
                if self.decode is not None and not tickets and self.decode.takes(batch):
                    logits = self.decode.forward(batch)
                    return (logits if rows is None else logits[rows.to(self.device)]).cpu()
                has_adapters = bool((batch.token_slots >= 0).any())  # still on the host
                batch = batch.to(self.device)
                keep = None if rows is None else rows.to(self.device)
                return self._compute(batch, keep, has_adapters).cpu()
        finally:
            self.attached.step.end()

    def _compute(
        self, batch: Batch, rows: torch.Tensor | None = None, has_adapters: bool = True
    ) -> torch.Tensor:
        """On the device, without waiting for it."""
        self.attached.set_slots(batch.token_slots if has_adapters else None)
        keep: Any = 0 if rows is None else rows
        output = self.model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=keep,
            paged=PagedAttention(batch, self.cache),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def synchronize(self) -> None:
        """Until nothing of any pass runs any more, also of one that failed."""
        if self._stream is not None:
            self._stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def close(self) -> None:
        """Gives the model its own attention back."""
        self.model.set_attn_implementation(self._attention)


def _rope_types(parameters: object) -> set[str]:
    """All rope types in a config's rope_parameters, which may be one dict or one per layer type."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return found.union(*(_rope_types(value) for value in parameters.values()))
