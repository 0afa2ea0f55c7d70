# SPDX-License-Identifier: Apache-2.0
"""LoRA inside a Hugging Face decoder: every targeted ``nn.Linear`` also computes its batch's adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from toppings import ops  # noqa: F401  (registers torch.ops.toppings)
from toppings._runtime import Arena, ModelShape, SlotTable
from toppings.errors import InvalidArgumentError, UnsupportedModelError

__all__ = ["AttachedModel", "LoraLinear", "attach"]

# Linears of one parent that read the same input, and so are computed by one GEMM and one LoRA operator.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
DEFAULT_ARENA_RANK = 32  # rank rows per slot that the arena holds unless told otherwise


@dataclass
class LoraStep:
    """Who uses which slot in the coming forward pass; shared by all layers of one model."""

    token_slots: torch.Tensor | None = None  # int32 [T]; None: no token has an adapter
    plan: torch.Tensor | None = None
    max_rank: int = 512


@dataclass
class LoraSite:
    """Linears with one input: ``y = x Wᵀ + bias``, then every token's adapter on top, in one operator.

    The first linear that is called computes all of them; its siblings, called with the very same tensor, take their part.
    """

    weight: torch.Tensor  # [ΣN, K]
    bias: torch.Tensor | None  # [ΣN]
    widths: list[int]
    arena: torch.Tensor  # 1-D: the layer's adapters
    slots: torch.Tensor  # int64 [S, L, 3]
    scales: torch.Tensor  # float32 [S, L]
    step: LoraStep
    _input: torch.Tensor | None = field(default=None, repr=False)
    _version: int = 0
    _parts: list[torch.Tensor | None] = field(default_factory=list, repr=False)

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if len(self.widths) == 1:
            return self._compute(x)
        version = 0 if x.is_inference() else x._version
        if self._input is not x or self._version != version or self._parts[index] is None:
            self._input, self._version = x, version
            self._parts = list(self._compute(x).split(self.widths, dim=-1))
        part = self._parts[index]
        if part is None:
            raise RuntimeError("unreachable: the part was computed above")
        self._parts[index] = None
        if not any(p is not None for p in self._parts):
            self._input = None
        return part

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        step = self.step
        if step.token_slots is None:
            return y
        if y.requires_grad:
            raise UnsupportedModelError(
                "LoRA layers: expected no autograd (torch.inference_mode() or no_grad()), got a differentiable input"
            )
        rows = y.view(-1, y.shape[-1])
        torch.ops.toppings.lora_forward_(
            rows,
            x.reshape(-1, x.shape[-1]),
            self.arena,
            self.arena,
            self.slots,
            self.scales,
            step.token_slots,
            self.widths,
            step.plan,
            step.max_rank,
        )
        return y


class LoraLinear(nn.Linear):
    """An ``nn.Linear`` whose output includes its tokens' adapters. Same parameters, same names."""

    def __init__(self, linear: nn.Linear, site: LoraSite, index: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.site, self.index = site, index

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.site.output(input, self.index)


@dataclass
class AttachedModel:
    """A model whose linears serve adapters, and the tables that say which ones.

    ``modules`` maps a module path (``model.layers.3.self_attn.q_proj``) to its (layer, projection) in ``shape``.
    """

    model: nn.Module
    shape: ModelShape
    modules: dict[str, tuple[int, int]]
    dtype: torch.dtype
    arena: Arena
    slots: SlotTable
    step: LoraStep
    _originals: dict[str, nn.Linear]

    def set_batch(self, token_slots: torch.Tensor | None) -> None:
        """Chooses the slot of every token of the coming forward passes: int32 [T], -1 for the base model alone."""
        if token_slots is not None and (token_slots.dim() != 1 or token_slots.dtype != torch.int32):
            raise InvalidArgumentError(
                f"token_slots: expected int32 [T], got {token_slots.dtype} {list(token_slots.shape)}"
            )
        if token_slots is None or not bool((token_slots >= 0).any()):
            self.step.token_slots = self.step.plan = None
            return
        self.step.plan = torch.ops.toppings.lora_plan(token_slots, self.slots.stats().slots)
        self.step.token_slots = token_slots

    def detach(self) -> nn.Module:
        """The model with its own linears again."""
        for path, linear in self._originals.items():
            _replace(self.model, path, linear)
        return self.model


def attach(
    model: nn.Module,
    *,
    max_slots: int = 8,
    lora_dtype: torch.dtype | None = None,
    arena_bytes: int | None = None,
    max_rank: int = 512,
) -> AttachedModel:
    """Replaces the ``nn.Linear``s of the decoder's layers by :class:`LoraLinear` and nothing else.

    Linears that share an input (q, k, v; gate, up) become views of one weight matrix and run as one GEMM.

    Args:
        max_slots: adapters resident at once.
        lora_dtype: of the arena, by default the model's.
        arena_bytes: device memory for adapters, over all layers; by default room for ``max_slots`` adapters of rank 32 on
            every projection. Taken from the system only as adapters fill it.
        max_rank: larger adapters are refused.

    Raises:
        UnsupportedModelError: no decoder layers with ``nn.Linear`` inside, or already attached.
        InvalidArgumentError: an argument out of range.
    """
    if max_slots < 1:
        raise InvalidArgumentError(f"max_slots: expected at least 1, got {max_slots}")
    if max_rank < 1:
        raise InvalidArgumentError(f"max_rank: expected at least 1, got {max_rank}")
    sites = _find_sites(model)
    num_layers = 1 + max(layer for layer, _ in sites)
    first = model.get_submodule(sites[0][1][0])
    dtype = lora_dtype or first.weight.dtype  # type: ignore[union-attr]
    name = _dtype_name(dtype)

    layers: list[list[tuple[str, int, int]]] = [[] for _ in range(num_layers)]
    modules: dict[str, tuple[int, int]] = {}
    for layer, paths in sites:
        for path in paths:
            linear = model.get_submodule(path)
            modules[path] = (layer, len(layers[layer]))
            layers[layer].append((path, linear.in_features, linear.out_features))  # type: ignore[arg-type]
    shape = ModelShape(layers)

    itemsize = torch.empty((), dtype=dtype).element_size()
    row_bytes = max(sum(k + n for _, k, n in projections) for projections in layers) * itemsize
    if arena_bytes is None:
        per_layer = max_slots * DEFAULT_ARENA_RANK * row_bytes
    else:
        per_layer = arena_bytes // num_layers
        if per_layer < row_bytes:
            raise InvalidArgumentError(
                f"arena_bytes: expected at least {row_bytes * num_layers} (one rank row everywhere), got {arena_bytes}"
            )
    arena = Arena(num_layers, per_layer, name)
    table = SlotTable(shape, arena, max_slots)
    slots, scales = torch.from_dlpack(table.slots()), torch.from_dlpack(table.scales())

    step = LoraStep(max_rank=max_rank)
    originals: dict[str, nn.Linear] = {}
    for layer, paths in sites:
        linears: list[nn.Linear] = [model.get_submodule(p) for p in paths]  # type: ignore[misc]
        row = shape.row(layer, modules[paths[0]][1])
        site = LoraSite(
            weight=_fuse([x.weight for x in linears]),
            bias=_fuse_bias(linears),
            widths=[x.out_features for x in linears],
            arena=torch.from_dlpack(arena.layer(layer)),
            slots=slots[row : row + len(paths)],
            scales=scales[row : row + len(paths)],
            step=step,
        )
        for index, (path, linear) in enumerate(zip(paths, linears, strict=True)):
            originals[path] = linear
            _replace(model, path, LoraLinear(linear, site, index))
    return AttachedModel(model, shape, modules, dtype, arena, table, step, originals)


def _find_sites(model: nn.Module) -> list[tuple[int, list[str]]]:
    """(layer, paths of linears with one input), in model order. The decoder's layers are the longest indexed list."""
    stacks: dict[str, list[tuple[int, str]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            raise UnsupportedModelError(f"model: expected one without LoRA layers, got one attached already ({path})")
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if type(module) is nn.Linear and at is not None and "experts" not in parts:
            stacks.setdefault(".".join(parts[:at]), []).append((int(parts[at]), path))
    if not stacks:
        raise UnsupportedModelError("model: expected decoder layers built from nn.Linear, got none")
    linears = max(stacks.values(), key=len)

    sites: list[tuple[int, list[str]]] = []
    taken: set[str] = set()
    known = {path for _, path in linears}
    for layer, path in linears:
        if path in taken:
            continue
        parent, _, name = path.rpartition(".")
        group = next((g for g in SHARED_INPUT if name in g), (name,))
        paths = [p for p in (f"{parent}.{n}" for n in group) if p in known]
        if not _fusable([model.get_submodule(p) for p in paths]):
            paths = [path]
        taken.update(paths)
        sites.append((layer, paths))
    return sites


def _fusable(linears: Sequence[nn.Module]) -> bool:
    return len({(x.in_features, x.weight.dtype, x.weight.device) for x in linears}) == 1  # type: ignore[union-attr]


def _fuse(parameters: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of all rows; the parameters become views of it, so no memory is held twice."""
    if len(parameters) == 1:
        return parameters[0].detach()
    fused = torch.cat([p.detach() for p in parameters])
    start = 0
    for parameter in parameters:
        stop = start + parameter.shape[0]
        parameter.data = fused[start:stop]
        start = stop
    return fused


def _fuse_bias(linears: list[nn.Linear]) -> torch.Tensor | None:
    biases = [x.bias for x in linears if x.bias is not None]
    if not biases:
        return None
    if len(biases) == len(linears):
        return _fuse(biases)
    return torch.cat(
        [x.bias.detach() if x.bias is not None else x.weight.new_zeros(x.out_features) for x in linears]
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _dtype_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if dtype not in names:
        raise InvalidArgumentError(f"lora_dtype: expected float32, float16 or bfloat16, got {dtype}")
    return names[dtype]
