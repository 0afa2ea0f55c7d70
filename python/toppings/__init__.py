# SPDX-License-Identifier: Apache-2.0
"""toppings: multi-LoRA serving without cold starts.

The operators are ``torch.ops.toppings.*``; :class:`Engine` and :func:`attach` serve a Hugging Face
decoder.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from toppings import cpu, reference
from toppings._runtime import Device, HostStore, version
from toppings.adapter import Adapter, LoraModule, read_adapter
from toppings.attachment import AttachedModel, attach
from toppings.errors import ToppingsError
from toppings.library import AdapterLibrary
from toppings.ops import pack_stacked, slots_from_stacked

if TYPE_CHECKING:
    from toppings.engine import Engine, EngineStats, Link, Request, SamplingParams

__version__ = version()
__all__ = [
    "Adapter",
    "AdapterLibrary",
    "AttachedModel",
    "Device",
    "Engine",
    "EngineStats",
    "HostStore",
    "Link",
    "LoraModule",
    "Request",
    "SamplingParams",
    "ToppingsError",
    "attach",
    "cpu",
    "pack_stacked",
    "read_adapter",
    "reference",
    "slots_from_stacked",
]

# The engine needs transformers, the rest doesn't: it is imported when first named.
_ENGINE = {"Engine", "EngineStats", "Link", "Request", "SamplingParams"}


def __getattr__(name: str) -> Any:
    if name in _ENGINE:
        return getattr(import_module("toppings.engine"), name)
    raise AttributeError(f"module 'toppings' has no attribute {name!r}")
