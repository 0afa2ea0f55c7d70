# SPDX-License-Identifier: Apache-2.0
"""An adapter described for people: one line per projection, not per module."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from toppings.adapter.adapter import Adapter


class ModuleFacts(NamedTuple):
    """One module: its path and what it costs."""

    path: str
    k: int
    n: int
    rank: int
    scale: float
    nbytes: int


def describe(adapter: Adapter) -> str:
    """Aligned text: source, digest, dtype and size, then for each projection its layers, shapes,
    ranks and scales."""
    modules = adapter.modules.items()
    return table(
        str(adapter.source) if adapter.source else "memory",
        adapter.digest,
        _distinct(str(module.a.dtype).removeprefix("torch.") for _, module in modules),
        adapter.nbytes,
        [
            ModuleFacts(path, m.a.shape[1], m.b.shape[0], m.rank, m.scale, m.nbytes)
            for path, m in modules
        ],
    )


def table(source: str, digest: str, dtype: str, nbytes: int, modules: Sequence[ModuleFacts]) -> str:
    facts = [
        ("source", source),
        ("digest", digest),
        ("dtype", dtype),
        ("bytes", f"{nbytes:,}"),
        ("modules", str(len(modules))),
        ("ranks", ", ".join(map(str, sorted({m.rank for m in modules})))),
    ]
    rows = [("projection", "layers", "K -> N", "rank", "scale", "bytes")]
    for projection, layers in _projections(modules).items():
        found = [module for _, module in layers]
        rows.append(
            (
                projection,
                _ranges(layer for layer, _ in layers if layer is not None),
                _distinct(f"{m.k} -> {m.n}" for m in found),
                ", ".join(map(str, sorted({m.rank for m in found}))),
                ", ".join(f"{scale:g}" for scale in sorted({m.scale for m in found})),
                f"{sum(m.nbytes for m in found):,}",
            )
        )
    return "\n".join([*_align(facts), "", *_align(rows)])


def _projections(modules: Iterable[ModuleFacts]) -> dict[str, list[tuple[int | None, ModuleFacts]]]:
    """Modules grouped by path with the layer index, their first numeric component, left out."""
    groups: dict[str, list[tuple[int | None, ModuleFacts]]] = {}
    for module in modules:
        parts = module.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = None if at is None else int(parts[at])
        if at is not None:
            parts[at] = "*"
        groups.setdefault(".".join(parts), []).append((layer, module))
    return groups


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _ranges(layers: Iterable[int]) -> str:
    """Ascending indices as "0-3, 7"; "-" for none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
