# SPDX-License-Identifier: Apache-2.0
"""Attaching adapters to a Hugging Face decoder, and the tables that say who uses which."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from toppings._runtime import Arena, Device, HostStore, Loader, ModelShape, SlotTable, Ticket
from toppings.errors import InvalidArgumentError, UnsupportedModelError
from toppings.layers import LoraLinear, LoraSite, LoraStep

__all__ = ["AttachedModel", "attach", "model_shape"]

# Linears of one parent that read the same input, and so are one GEMM and one LoRA operator.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
DEFAULT_ARENA_RANK = 32  # rank rows per slot that the arena holds unless told otherwise
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class AttachedModel:
    """A model whose linears serve adapters, and the tables that say which ones.

    ``modules`` maps a module path (``model.layers.3.self_attn.q_proj``) to its (layer, projection)
    in ``shape``.
    """

    model: nn.Module
    shape: ModelShape
    modules: dict[str, tuple[int, int]]
    dtype: torch.dtype
    device: Device
    arena: Arena
    slots: SlotTable
    loader: Loader
    step: LoraStep
    num_slots: int
    _originals: dict[str, nn.Linear]

    def set_batch(self, token_slots: torch.Tensor | None, tickets: Sequence[Ticket] = ()) -> None:
        """Chooses the slot of every token of the coming forward passes: int32 [T], -1 for none, on
        the model's device.

        tickets: of loads still under way among these slots. Each layer of the passes waits until
        they have arrived there: on a GPU in torch's current stream, without the host.
        """
        if token_slots is not None and (token_slots.dim() != 1 or token_slots.dtype != torch.int32):
            shape = list(token_slots.shape)
            raise InvalidArgumentError(
                f"token_slots: expected int32 [T], got {token_slots.dtype} {shape}"
            )
        # On a GPU to look for one would stop the host until the stream has got there.
        nobody = token_slots is None or (
            token_slots.device.type == "cpu" and not bool((token_slots >= 0).any())
        )
        self.begin_pass(() if nobody else tickets)
        self.set_slots(None if nobody else token_slots)

    def begin_pass(self, tickets: Sequence[Ticket] = ()) -> None:
        """The first half of :meth:`set_batch`: the tables are brought to the device."""
        stream = _current_stream() if self.device.kind == "cuda" else 0
        self.slots.upload(stream)
        self.step.begin(tickets, stream)

    def set_slots(self, token_slots: torch.Tensor | None) -> None:
        """The second half, which may be captured into a CUDA graph."""
        self.step.token_slots = token_slots
        self.step.plan = (
            None
            if token_slots is None
            else torch.ops.toppings.lora_plan(token_slots, self.num_slots)
        )

    def detach(self) -> nn.Module:
        """The model with its own linears again."""
        for path, linear in self._originals.items():
            _replace(self.model, path, linear)
        return self.model


@dataclass(frozen=True)
class _Group:
    """Linears of one layer with one input, by path."""

    layer: int
    linears: dict[str, nn.Linear]


def attach(
    model: nn.Module,
    *,
    device: Device | None = None,
    store: HostStore | None = None,
    max_slots: int = 8,
    lora_dtype: torch.dtype | None = None,
    arena_bytes: int | None = None,
    max_rank: int = 512,
    loader_cpu: int = -1,
) -> AttachedModel:
    """Replaces the ``nn.Linear``s of the decoder's layers by :class:`LoraLinear` and nothing else.

    Linears that share an input (q, k, v; gate, up) become views of one weight matrix and run as one
    GEMM. Attach a model when it has its final dtype and device, and to serve: no gradients reach
    its weights, and an input must not change between the calls of linears that share it.

    Where adapters come to lie: on the device, in an arena that ``loader`` copies them into. In
    plain main memory (``device.is_in_place``), with a store and no arena_bytes, they stay where
    their images lie: nothing is copied, and an acquired slot is ready at once.

    Args:
        device: by default where the model is.
        store: whose images are used; it was made with the same device.
        max_slots: adapters resident at once.
        lora_dtype: of the arena, by default the model's.
        arena_bytes: device memory for adapters, over all layers; by default room for ``max_slots``
            adapters of rank 32 on every projection. On the host it is taken from the system only as
            adapters fill it.
        max_rank: larger adapters are refused.
        loader_cpu: the core that the loader's thread is pinned to; -1: none.

    Raises:
        UnsupportedModelError: no decoder layers with ``nn.Linear`` inside, or already attached.
        InvalidArgumentError: an argument out of range, or a device where the model isn't.
        DeviceError: no such GPU, or a build without CUDA.
    """
    for name, value in (("max_slots", max_slots), ("max_rank", max_rank)):
        if value < 1:
            raise InvalidArgumentError(f"{name}: expected at least 1, got {value}")
    groups = _find_groups(model)
    weight = next(iter(groups[0].linears.values())).weight
    dtype = lora_dtype or weight.dtype
    if dtype not in DTYPES:
        known = ", ".join(DTYPES.values())
        raise InvalidArgumentError(f"lora_dtype: expected one of {known}, got {dtype}")
    shape, modules = _shape_of(groups)
    device = _device_of(weight) if device is None else device
    if (device.kind == "cuda") != weight.is_cuda:
        raise InvalidArgumentError(
            f"device: expected the one the model is on ({weight.device}), got {device.name}"
        )
    if store is not None and device.is_in_place and arena_bytes is None:
        arena = Arena.in_place(store, shape.num_layers, DTYPES[dtype])
    else:
        bytes_per_layer = _bytes_per_layer(shape, dtype, max_slots, arena_bytes)
        arena = Arena(shape.num_layers, bytes_per_layer, DTYPES[dtype], device)
    table = SlotTable(shape, arena, max_slots)
    loader = Loader(table, cpu=loader_cpu)
    slots, scales = from_dlpack(table.slots()), from_dlpack(table.scales())

    step = LoraStep(max_rank=max_rank)
    originals: dict[str, nn.Linear] = {}
    for group in groups:
        linears = list(group.linears.values())
        row = shape.row(*modules[next(iter(group.linears))])
        site = LoraSite(
            layer=group.layer,
            weight=_fuse([x.weight for x in linears]),
            bias=_fuse_bias(linears),
            widths=[x.out_features for x in linears],
            arena=from_dlpack(arena.layer(group.layer)),
            slots=slots[row : row + len(linears)],
            scales=scales[row : row + len(linears)],
            step=step,
        )
        for index, (path, linear) in enumerate(group.linears.items()):
            originals[path] = linear
            _replace(model, path, LoraLinear(linear, site, index))
    return AttachedModel(
        model=model,
        shape=shape,
        modules=modules,
        dtype=dtype,
        device=device,
        arena=arena,
        slots=table,
        loader=loader,
        step=step,
        num_slots=max_slots,
        _originals=originals,
    )


def model_shape(model: nn.Module) -> tuple[ModelShape, dict[str, tuple[int, int]]]:
    """The projections that adapters of this model may target, as :func:`attach` finds them, and
    where each module path stands in them: (layer, projection). The model may be on the meta device.

    UnsupportedModelError: no decoder layers with ``nn.Linear`` inside, or already attached.
    """
    return _shape_of(_find_groups(model))


def _device_of(weight: torch.Tensor) -> Device:
    if weight.device.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"model: expected it on cpu or cuda, got {weight.device}")
    return Device.cuda(weight.get_device()) if weight.is_cuda else Device.host()


def _current_stream() -> int:
    handle: int = torch.cuda.current_stream().cuda_stream
    return handle


def _find_groups(model: nn.Module) -> list[_Group]:
    """In model order. The decoder's layers are the indexed list that holds most linears."""
    stacks: dict[str, dict[str, tuple[int, nn.Linear]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            raise UnsupportedModelError(
                f"model: expected one without LoRA layers, got one attached already ({path})"
            )
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        # An expert sees some of the batch's tokens, so it can't know their slots.
        if type(module) is nn.Linear and at is not None and "experts" not in parts:
            stack = stacks.setdefault(".".join(parts[:at]), {})
            stack[path] = int(parts[at]), module
    if not stacks:
        raise UnsupportedModelError("model: expected decoder layers built from nn.Linear, got none")
    found = max(stacks.values(), key=len)

    groups: list[_Group] = []
    taken: set[str] = set()
    for path, (layer, linear) in found.items():
        if path in taken:
            continue
        parent, _, name = path.rpartition(".")
        names = next((group for group in SHARED_INPUT if name in group), (name,))
        paths = [p for p in (f"{parent}.{n}" for n in names) if p in found]
        linears = {p: found[p][1] for p in paths}
        if not _fusable(list(linears.values())):
            linears = {path: linear}
        taken.update(linears)
        groups.append(_Group(layer, linears))
    return groups


def _fusable(linears: Sequence[nn.Linear]) -> bool:
    return len({(x.in_features, x.weight.dtype, x.weight.device) for x in linears}) == 1


def _shape_of(groups: Sequence[_Group]) -> tuple[ModelShape, dict[str, tuple[int, int]]]:
    layers: list[list[tuple[str, int, int]]] = [[] for _ in range(1 + max(g.layer for g in groups))]
    modules: dict[str, tuple[int, int]] = {}
    for group in groups:
        projections = layers[group.layer]
        for path, linear in group.linears.items():
            modules[path] = group.layer, len(projections)
            projections.append((path, linear.in_features, linear.out_features))
    return ModelShape(layers), modules


def _bytes_per_layer(
    shape: ModelShape, dtype: torch.dtype, max_slots: int, arena_bytes: int | None
) -> int:
    layers = [shape.layer(i) for i in range(shape.num_layers)]
    row_bytes = max(sum(k + n for _, k, n in layer) for layer in layers) * dtype.itemsize
    if arena_bytes is None:
        return max_slots * DEFAULT_ARENA_RANK * row_bytes
    least = row_bytes * shape.num_layers
    if arena_bytes < least:
        raise InvalidArgumentError(
            f"arena_bytes: expected at least {least} (one rank row everywhere), got {arena_bytes}"
        )
    return arena_bytes // shape.num_layers


def _fuse(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all rows; the parameters become views of it, so nothing is held twice."""
    if len(parameters) == 1:
        return parameters[0].detach()
    fused = torch.cat([p.detach() for p in parameters])
    sizes = [p.shape[0] for p in parameters]
    for parameter, part in zip(parameters, fused.split(sizes), strict=True):
        parameter.data = part
    return fused


def _fuse_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    biases = [x.bias for x in linears if x.bias is not None]
    if not biases:
        return None
    if len(biases) == len(linears):
        return _fuse(biases)
    zeros = [x.weight.new_zeros(x.out_features) for x in linears]
    parts: list[torch.Tensor] = [
        z if x.bias is None else x.bias.detach() for x, z in zip(linears, zeros, strict=True)
    ]
    return torch.cat(parts)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
