# SPDX-License-Identifier: Apache-2.0
"""``toppings pack``: a PEFT folder as one file that is read at disk speed, for one base model."""

import argparse
from pathlib import Path

import torch
from torch import nn

from toppings.adapter import read_adapter
from toppings.adapter.image import pack
from toppings.attachment import DTYPES, model_shape
from toppings.errors import InvalidArgumentError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="ADAPTER", help="a PEFT folder")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="the folder of the base model; only its config.json is read",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="an older one is replaced"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES.values(),
        help="what the engine serves adapters in (default: the model's)",
    )


def run(args: argparse.Namespace) -> None:
    model, dtype = _meta_model(args.model)
    shape, modules = model_shape(model)
    if args.dtype:
        dtype = getattr(torch, args.dtype)
    image = pack(read_adapter(args.path), shape, modules, dtype, args.output)
    layout = image.layout
    ranks = [
        [layout.rank(layer, i) for i in range(len(shape.layer(layer)))]
        for layer in range(shape.num_layers)
    ]
    targeted = sum(any(row) for row in ranks)
    distinct = sorted({rank for row in ranks for rank in row if rank > 0})
    print(
        f"{args.output}: {layout.bytes:,} bytes of {layout.dtype},"
        f" {targeted} of {shape.num_layers} layers,"
        f" rank {', '.join(map(str, distinct))}, digest {image.digest}"
    )


def _meta_model(folder: Path) -> tuple[nn.Module, torch.dtype]:
    """The model without weights, and the dtype it is served in."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InvalidArgumentError(
            f"transformers: expected it installed (pip install 'toppings[engine]'), got: {error}"
        ) from None
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            f"--model: expected the folder of a Hugging Face model, got none with a config.json"
            f" ({folder})"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers checks few values, so whatever a bad one comes to
        reason = str(error).strip().splitlines()
        raise InvalidArgumentError(
            f"--model: expected a causal language model that transformers knows, got"
            f" {reason[0] if reason else type(error).__name__} ({folder})"
        ) from None
    return model, next(model.parameters()).dtype
