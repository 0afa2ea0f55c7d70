# SPDX-License-Identifier: Apache-2.0
"""Runs the model on a packed batch."""

from typing import Any

import torch
from transformers import PreTrainedModel

from toppings.attachment import AttachedModel
from toppings.engine.attention import NAME, PagedAttention
from toppings.engine.batch import Batch, Chunk, pack
from toppings.engine.kv_cache import KvCache
from toppings.errors import UnsupportedModelError

__all__ = ["Runner"]

# Their frequencies depend on the longest sequence of a batch, so a request's logits would depend on
# its neighbours.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Runner:
    """One model with its adapters attached, and its KV cache."""

    def __init__(self, attached: AttachedModel, kv_blocks: int, block_size: int) -> None:
        """Runs one token through the model, which makes the KV cache and shows that every layer
        uses it.

        Raises:
            UnsupportedModelError: a part of the model can't be served in packed batches.
        """
        model = attached.model
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"model: expected a transformers model, got {type(model).__name__}"
            )
        config = model.config.get_text_config()
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError("model: expected a decoder, got an encoder-decoder")
        for kind in _rope_types(getattr(config, "rope_parameters", None)):
            if kind in BATCH_DEPENDENT_ROPE:
                raise UnsupportedModelError(
                    f"rope type: expected one that depends on positions alone, got {kind!r}"
                )
        self.attached, self.model = attached, model
        self.cache = KvCache(kv_blocks, block_size)
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = getattr(config, "max_position_embeddings", 2**31)
        self._attention = str(model.config._attn_implementation)
        model.set_attn_implementation(NAME)
        try:
            self.forward(pack([Chunk([0], 0, [1], -1)], block_size))
            missing = set(range(config.num_hidden_layers)) - set(self.cache.layers)
            if missing:
                raise UnsupportedModelError(
                    f"layers {sorted(missing)}: expected attention with its own keys and values,"
                    " got none"
                )
        except BaseException:
            self.close()
            raise

    @torch.inference_mode()
    def forward(self, batch: Batch, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [R, V] of the packed rows given (int64 [R]), of all T by default. Fills the KV
        cache.
        """
        self.attached.set_batch(batch.token_slots)
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

    def close(self) -> None:
        """Gives the model its own attention back."""
        self.model.set_attn_implementation(self._attention)


def _rope_types(parameters: object) -> set[str]:
    """All rope types in a config's rope_parameters, which may be one dict or one per layer type."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return found.union(*(_rope_types(value) for value in parameters.values()))
