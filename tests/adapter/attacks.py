# SPDX-License-Identifier: Apache-2.0
"""Writes adapter folders: good ones, and any that a hostile or careless author might produce."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

Q = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, object] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def pair(
    module: str = Q, rank: int = 2, dtype: torch.dtype = torch.float32, k: int = 6, n: int = 4
):
    """Random A and B of one module under the names PEFT gives them."""
    torch.manual_seed(len(module) + rank)
    return {
        key(module, "A"): torch.randn(rank, k).to(dtype),
        key(module, "B"): torch.randn(n, rank).to(dtype),
    }


def write_folder(folder: Path, tensors=None, config=None, **changes) -> Path:
    """A PEFT folder; ``changes`` override keys of the config, ``config`` replaces its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**CONFIG, **changes}).encode() if config is None else config
    (folder / "adapter_config.json").write_bytes(text)
    save_file(pair() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header (bytes, or an object for JSON) and any stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(folder: Path, content: bytes) -> Path:
    """A folder with a good config and ``content`` for its weights."""
    write_folder(folder)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder
