# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over a Hugging Face decoder (needs transformers)."""

from toppings.engine.device import Link
from toppings.engine.engine import Engine, EngineStats
from toppings.engine.loading import Mode
from toppings.engine.request import FinishReason, Request
from toppings.engine.sampling import SamplingParams

__all__ = ["Engine", "EngineStats", "FinishReason", "Link", "Mode", "Request", "SamplingParams"]
