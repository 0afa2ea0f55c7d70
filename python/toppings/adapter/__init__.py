# SPDX-License-Identifier: Apache-2.0
"""Adapters: PEFT LoRA folders read into memory, checked before a byte of weight is allocated.

Arrows go one way: parsing → patterns, features, header → config; adapter → weights → read.
"""

from toppings.adapter.adapter import Adapter, LoraModule
from toppings.adapter.config import LoraConfig
from toppings.adapter.inspect import describe
from toppings.adapter.read import read_adapter

__all__ = ["Adapter", "LoraConfig", "LoraModule", "describe", "read_adapter"]
