# SPDX-License-Identifier: Apache-2.0
"""A PEFT folder to an Adapter: no network, no pickle; which folders may be read, callers decide."""

import os
from pathlib import Path

import torch

from toppings.adapter.adapter import Adapter
from toppings.adapter.config import MAX_CONFIG_BYTES, parse_config
from toppings.adapter.features import tensor_feature
from toppings.adapter.header import read_header
from toppings.adapter.parsing import open_regular, shown
from toppings.adapter.tensors import check_dtype
from toppings.adapter.weights import load, plan
from toppings.errors import AdapterFormatError, ToppingsError, UnsupportedAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What a folder may hold in place of PEFT's files, by the end of a file's name.
_FOREIGN = {
    ".gguf": "a GGUF file",
    ".nemo": "a NeMo archive",
    "model.lora_weights.npy": "TensorRT-LLM weights",
    "adapter_model.bin": "a pickle, which could run code",
    "adapter_model.pt": "a pickle, which could run code",
    "adapter_model.pth": "a pickle, which could run code",
}


def read_adapter(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Adapter:
    """Reads the PEFT LoRA adapter in the folder ``path``: adapter_config.json and
    adapter_model.safetensors.

    The config and the header of the weights are checked in full before any weight is read or
    memory for it is taken. ``dtype`` casts; None keeps the file's: in one pair of A and B the
    narrowest that holds both exactly (float32 for float16 with bfloat16).

    Raises UnsupportedAdapterError for a feature or format that is refused by name,
    AdapterFormatError for files that are missing, damaged or contradict each other,
    InvalidArgumentError for another ``dtype``.
    """
    check_dtype(dtype)
    folder = Path(os.fsdecode(path))
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a null character"
        raise AdapterFormatError(f"adapter: expected a folder, got {reason} ({folder})") from None
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            raise _missing(folder, name, names)
    with open_regular(folder / CONFIG_FILE) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterFormatError(
            f"{CONFIG_FILE}: expected at most {MAX_CONFIG_BYTES} bytes, got more ({folder})"
        )
    config = parse_config(data, str(folder / CONFIG_FILE))
    for name in names:
        if name.startswith("new_embeddings."):
            raise UnsupportedAdapterError(
                f"{name}: expected no new token embeddings, got a file of them ({folder})"
            )
    weights = folder / WEIGHTS_FILE
    pairs = plan(read_header(weights), config, str(weights))
    return Adapter(load(weights, pairs, dtype), source=folder)


def _missing(folder: Path, name: str, names: list[str]) -> ToppingsError:
    """The error for a folder without the file ``name``, told from what the folder holds instead."""
    for other in names:
        foreign = next((kind for end, kind in _FOREIGN.items() if other.endswith(end)), None)
        if foreign is None and other.endswith(".safetensors"):
            foreign = _foreign_tensors(folder / other)
        if foreign is not None and WEIGHTS_FILE not in set(names) - {other}:
            return UnsupportedAdapterError(
                f"{name}: expected a PEFT folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
                f"got {shown(other)}: {foreign} ({folder})"
            )
    return AdapterFormatError(f"{name}: expected a file of this name, got none ({folder})")


def _foreign_tensors(path: Path) -> str | None:
    try:
        found = (tensor_feature(name) for name in read_header(path))
        return next((feature for feature in found if feature and "kohya" in feature), None)
    except ToppingsError:
        return None
