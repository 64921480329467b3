"""Look up a device by name, with an error that lists the devices of this machine."""

import torch

from mxcompile.errors import InputError


def find_device(name: str | torch.device) -> torch.device:
    """The device with that name, with its index ("cuda" becomes `cuda:0`); raises InputError if it does not exist."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        listed = ", ".join(_available())
        raise InputError(f"there is no device {str(name)!r} ({reason}); this machine has: {listed}") from error


def _available() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]
