# SPDX-License-Identifier: Apache-2.0
"""An adapter in host memory: pairs of matrices by module path, and the digest of their content."""

import functools
import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from toppings.adapter.parsing import shown
from toppings.adapter.tensors import DTYPES, bytes_of, check_dtype, finite_copy, is_scale
from toppings.errors import InvalidArgumentError

_MAX_PATH = 512
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def is_module_path(text: str) -> bool:
    """Whether ``text`` is dotted names of ASCII letters, digits, ``_`` and ``-``, 512 at most."""
    return len(text) <= _MAX_PATH and _PATH.fullmatch(text) is not None


@dataclass(frozen=True, eq=False)
class LoraModule:
    """y += scale · (x·aᵀ)·bᵀ, one projection: ``a [r, K]``, ``b [N, r]`` of one dtype, on CPU."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        shapes = f"{list(self.a.shape)} and {list(self.b.shape)}"
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InvalidArgumentError(f"LoraModule: expected a [r, K] and b [N, r], got {shapes}")
        if 0 in self.a.shape or 0 in self.b.shape:
            raise InvalidArgumentError(f"LoraModule: expected sizes of at least 1, got {shapes}")
        if self.a.dtype != self.b.dtype or self.a.dtype not in DTYPES:
            raise InvalidArgumentError(
                "LoraModule: expected one dtype of float32, float16 or bfloat16, "
                f"got {self.a.dtype} and {self.b.dtype}"
            )
        if self.a.device.type != "cpu" or self.b.device.type != "cpu":
            raise InvalidArgumentError(
                f"LoraModule: expected CPU tensors, got {self.a.device} and {self.b.device}"
            )
        if not is_scale(self.scale):
            raise InvalidArgumentError(
                f"LoraModule: expected a scale finite in float32, got {self.scale}"
            )

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA pairs by module path (``model.layers.3.self_attn.q_proj``), in natural layer order.

    ``source`` is where it was read from, None for one made in memory. The tensors are the adapter's
    own and must not be written to: ``digest`` is computed once.
    """

    modules: Mapping[str, LoraModule]
    source: Path | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise InvalidArgumentError("Adapter: expected at least one module, got none")
        for path in self.modules:
            if not is_module_path(path):
                raise InvalidArgumentError(
                    f"Adapter: expected dotted module paths, got {shown(path)}"
                )
        ordered = {path: self.modules[path] for path in sorted(self.modules, key=_natural)}
        object.__setattr__(self, "modules", MappingProxyType(ordered))

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
        dtype: torch.dtype | None = None,
    ) -> "Adapter":
        """An adapter of ``(a [r, K], b [N, r], scale)`` by module path; the tensors are copied.

        ``dtype`` casts; without it each pair keeps the narrowest dtype that holds both exactly.
        Raises InvalidArgumentError, by module, for what LoraModule or a file would be refused for.
        """
        check_dtype(dtype)
        modules = {}
        for path, (a, b, scale) in tensors.items():
            for tensor in (a, b):
                # Before the copy: it would turn integers into weights without a word.
                if tensor.dtype not in DTYPES or tensor.numel() == 0:
                    raise InvalidArgumentError(
                        f"{path}: expected float32, float16 or bfloat16 and sizes of at least 1, "
                        f"got {tensor.dtype} {list(tensor.shape)}"
                    )
            own = dtype or torch.promote_types(a.dtype, b.dtype)
            try:
                modules[path] = LoraModule(
                    finite_copy(a, own, "a"), finite_copy(b, own, "b"), float(scale)
                )
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"{path}: {error}") from None
        return cls(modules)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def max_rank(self) -> int:
        return self.ranks[-1]

    @property
    def nbytes(self) -> int:
        return sum(module.nbytes for module in self.modules.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every module's exactly."""
        return functools.reduce(
            torch.promote_types, (module.a.dtype for module in self.modules.values())
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of what is computed with: paths, shapes, dtypes, float32 scales, bytes.

        Independent of the order of modules, of the source and of how the scale came about.
        """
        sha = hashlib.sha256(b"toppings adapter 1")
        for path in sorted(self.modules):
            module = self.modules[path]
            for text in (path, str(module.a.dtype)):
                sha.update(struct.pack("<I", len(text)) + text.encode())
            sizes = (*module.a.shape, *module.b.shape)
            sha.update(struct.pack("<4Qf", *sizes, module.scale))
            sha.update(bytes_of(module.a))
            sha.update(bytes_of(module.b))
        return sha.hexdigest()


def _natural(path: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sorts layer 10 after layer 9."""
    parts = path.split(".")
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts], path
