"""Devices by name: found, or an error that names the device and lists those there are."""

import pytest
import torch

from mxcompile.errors import InputError
from mxcompile.tensor.devices import find_device


def test_a_device_is_found_by_its_name():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", torch.device("cuda", 99)], ids=str)
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=rf"there is no device '{name}' \(.+\); this machine has: cpu"):
        find_device(name)


def test_the_devices_of_an_accelerator_are_listed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"this machine has: cpu, cuda:0, cuda:1$"):
        find_device("tpu")
