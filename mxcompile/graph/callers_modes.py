"""Modes of torch that the caller has set, and that must not reach what mxcompile computes."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Final

import torch

_ONE_AT_A_TIME: Final = RLock()
"""torch.export replaces functions of torch for the whole process while it traces."""


@contextmanager
def without_callers_modes() -> Generator[None]:
    """Run a block, or the decorated function, outside of inference mode, no_grad and autocast; threads take turns.

    A tensor made in inference mode can never be trained or saved for a gradient, and autocast would round statistics
    to half precision.
    """
    accelerator = torch.accelerator.current_accelerator()
    with _ONE_AT_A_TIME, ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            modes.enter_context(torch.autocast(device, enabled=False))
        yield
