# SPDX-License-Identifier: Apache-2.0
"""The device that an engine computes on, from what its caller names."""

from dataclasses import dataclass

import torch

from toppings._runtime import Device
from toppings.engine.arguments import check_int, check_number
from toppings.errors import InvalidArgumentError

__all__ = ["Link", "open_device"]


@dataclass(frozen=True)
class Link:
    """An emulated link between host memory and the adapters' arena, for measurements on a machine
    without a GPU. All copies under way share its bandwidth; each begins after the latency.

    cpu: the core that its threads are pinned to; -1: none.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0
    cpu: int = -1

    def __post_init__(self) -> None:
        check_number("link bytes_per_second", self.bytes_per_second)
        check_number("link latency_seconds", self.latency_seconds)
        check_int("link cpu", self.cpu)


def open_device(device: str | Device, link: Link | None, model: torch.nn.Module) -> Device:
    """device: "cpu", "cuda", "cuda:<index>", or one that exists; the model's parameters lie there.

    Raises:
        InvalidArgumentError: another name, a model elsewhere, or a link beside one that isn't
            "cpu".
        DeviceError: no such GPU, or a build without CUDA.
    """
    if link is not None and not isinstance(link, Link):
        raise InvalidArgumentError(f"link: expected a toppings.Link or None, got {link!r}")
    places = {parameter.device for parameter in model.parameters()}
    if isinstance(device, Device):
        kind, wanted = ("cuda" if device.kind == "cuda" else "cpu"), device.name
    else:
        kind, wanted = str(device).partition(":")[0], str(device)
        if kind not in ("cpu", "cuda") or (kind == "cpu" and wanted != "cpu"):
            raise InvalidArgumentError(
                f"device: expected 'cpu', 'cuda', 'cuda:<index>' or a Device, got {device!r}"
            )
    place = next(iter(places))
    if len(places) != 1 or place.type != kind or wanted not in _names(place, device):
        found = ", ".join(sorted(map(str, places)))
        raise InvalidArgumentError(f"model: expected it on device {wanted!r}, got it on {found}")
    if link is not None and wanted != "cpu":
        raise InvalidArgumentError(
            f"link: expected none but for device 'cpu', got one for {wanted!r}"
        )
    if isinstance(device, Device):
        return device
    if place.type == "cuda":
        return Device.cuda(place.index)
    if link is None:
        return Device.host()
    return Device.host(link.bytes_per_second, link.latency_seconds, link.cpu)


def _names(place: torch.device, device: str | Device) -> set[str]:
    """Under which a device is the one at this place. A host device has a name for its link."""
    if isinstance(device, Device) and place.type == "cpu":
        return {device.name}
    return {place.type, str(place)}
