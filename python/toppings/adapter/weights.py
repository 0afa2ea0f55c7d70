# SPDX-License-Identifier: Apache-2.0
"""``adapter_model.safetensors``: tensors paired up, checked against the config, then read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from toppings.adapter.adapter import LoraModule, is_module_path
from toppings.adapter.config import LoraConfig
from toppings.adapter.features import tensor_feature
from toppings.adapter.header import TensorInfo
from toppings.adapter.parsing import shown
from toppings.adapter.tensors import finite_copy, is_scale
from toppings.errors import AdapterFormatError, InvalidArgumentError, UnsupportedAdapterError

PREFIX = "base_model.model."

# PEFT strips the adapter's name from the keys it saves; other writers leave it in, after lora_A.
_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)


@dataclass(frozen=True)
class Pair:
    """One module's tensors in the file, found consistent with each other and with the config."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float


def plan(tensors: Mapping[str, TensorInfo], config: LoraConfig, where: str) -> list[Pair]:
    """Pairs up the tensors of a file; every one must belong to a pair that the config describes.

    Raises UnsupportedAdapterError for tensors that are refused by name, AdapterFormatError for an
    empty file, a half pair, a module outside of the config, or shapes that contradict the ranks.
    """
    sides: dict[tuple[str, str], TensorInfo] = {}
    adapters: set[str | None] = set()
    for name, info in tensors.items():
        module, side, adapter = _split(name, where)
        adapters.add(adapter)
        if len(adapters) > 1:
            raise AdapterFormatError(
                f"tensor {shown(name)}: expected one adapter in the file, got several ({where})"
            )
        sides[module, side] = info
    if not sides:
        raise AdapterFormatError(f"adapter: expected at least one pair, got none ({where})")
    for (module, side), info in sides.items():
        other = "B" if side == "A" else "A"
        if (module, other) not in sides:
            raise AdapterFormatError(
                f"tensor {shown(info.name)}: expected lora_{other} beside it, got none ({where})"
            )
    return [
        _pair(module, info, sides[module, "B"], config, where)
        for (module, side), info in sides.items()
        if side == "A"
    ]


def _split(name: str, where: str) -> tuple[str, str, str | None]:
    """The module path, "A" or "B", and the adapter's name if the key has one."""
    feature = tensor_feature(name)
    found = _KEY.fullmatch(name)
    if feature is None and found is None and name.startswith(PREFIX):
        other = any(part.startswith("lora_") for part in name.split("."))
        feature = "an unknown kind of LoRA tensor" if other else "a full weight of the base model"
    if feature is not None:
        raise UnsupportedAdapterError(
            f"tensor {shown(name)}: expected lora_A or lora_B of a linear layer, "
            f"got {feature}, which is not supported ({where})"
        )
    if found is None or not is_module_path(found["module"]):
        raise AdapterFormatError(
            f"tensor {shown(name)}: expected a name like {PREFIX}<module path>.lora_A.weight, "
            f"got another ({where})"
        )
    return found["module"], found["side"], found["adapter"]


def _pair(module: str, a: TensorInfo, b: TensorInfo, config: LoraConfig, where: str) -> Pair:
    for info, form in ((a, "[r, K]"), (b, "[N, r]")):
        if len(info.shape) > 2:
            raise UnsupportedAdapterError(
                f"tensor {shown(info.name)}: expected {form}, got {list(info.shape)}: "
                f"convolution LoRA is not supported ({where})"
            )
        if len(info.shape) != 2 or 0 in info.shape:
            raise AdapterFormatError(
                f"tensor {shown(info.name)}: expected {form} with sizes of at least 1, "
                f"got {list(info.shape)} ({where})"
            )
    if not config.targets(module):
        raise AdapterFormatError(
            f"tensor {shown(a.name)}: expected a module that the config targets, "
            f"got one that it leaves out ({where})"
        )
    rank, scale = config.rank_of(module), config.scale_of(module)
    for info, got in ((a, a.shape[0]), (b, b.shape[1])):
        if got != rank:
            raise AdapterFormatError(
                f"tensor {shown(info.name)}: expected rank {rank} as in the config, "
                f"got {got} ({where})"
            )
    if not is_scale(scale):
        raise AdapterFormatError(
            f"scale of {shown(module)}: expected a number finite in float32, got {scale} ({where})"
        )
    return Pair(module, a, b, scale)


def load(path: Path, pairs: list[Pair], dtype: torch.dtype | None) -> dict[str, LoraModule]:
    """Reads the pairs into memory of their own, in ``dtype`` or in the wider one of each pair.

    Raises AdapterFormatError for values that aren't finite and for a file that has changed since
    its header was read.
    """
    modules = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for pair in pairs:
                own = dtype or torch.promote_types(pair.a.dtype, pair.b.dtype)
                a, b = (_read(file.get_tensor(i.name), i, own) for i in (pair.a, pair.b))
                modules[pair.module] = LoraModule(a, b, pair.scale)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(
            f"{path.name}: expected safetensors data, got {type(error).__name__} ({path})"
        ) from error
    except InvalidArgumentError as error:
        raise AdapterFormatError(f"{error} ({path})") from None
    return modules


def _read(tensor: torch.Tensor, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
        raise InvalidArgumentError(
            f"tensor {shown(info.name)}: expected {info.dtype} {list(info.shape)} as its header "
            f"had, got {tensor.dtype} {list(tensor.shape)}"
        )
    return finite_copy(tensor, dtype, f"tensor {shown(info.name)}")
