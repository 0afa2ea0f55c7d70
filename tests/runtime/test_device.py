# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from toppings._runtime import Device, built_with_cuda
from toppings.errors import DeviceError, InvalidArgumentError


def test_main_memory_is_one_device_and_in_place() -> None:
    device = Device.host()
    assert device is Device.host()
    assert (device.kind, device.name, device.is_in_place) == ("host", "host", True)


def test_a_link_is_named_with_its_numbers() -> None:
    device = Device.host(bytes_per_second=4e9, latency_seconds=10e-6, cpu=0)
    assert device.kind == "host"
    assert device.name == "host, link of 4.0 GB/s and 10 us (emulated)"
    assert not device.is_in_place


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_links_that_cant_be_are_refused(bad: float) -> None:
    with pytest.raises(InvalidArgumentError, match="bytes_per_second: expected finite"):
        Device.host(bad)


def test_a_core_or_a_latency_needs_a_link() -> None:
    with pytest.raises(InvalidArgumentError, match="bytes_per_second: expected"):
        Device.host(latency_seconds=1e-6)
    with pytest.raises(InvalidArgumentError, match="bytes_per_second: expected"):
        Device.host(cpu=0)


def test_cores_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="cpu: expected"):
        Device.host(1e9, cpu=1 << 20)


def test_gpus_that_arent_there_are_refused() -> None:
    expected = "expected (a GPU and its driver|one of)" if built_with_cuda() else "expected a build"
    with pytest.raises(DeviceError, match=f"cuda:99: {expected}"):
        Device.cuda(99)
