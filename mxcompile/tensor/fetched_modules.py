"""Run a module whose tensors lie in files: each submodule's own are brought to the device while its forward runs."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def tensors_fetched(module: nn.Module, fetch: Callable[[Tensor], Tensor]) -> Generator[None]:
    """While the block runs, every submodule reads `fetch(tensor)` in the place of each of its parameters and buffers.

    The submodules hold their own tensors again afterwards, also if a forward fails.
    """
    entered: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(child: nn.Module, *_: object) -> None:
        for tensors in _own(child):
            for name, tensor in tensors.items():
                if tensor is not None and (used := fetch(tensor)) is not tensor:
                    entered.append((tensors, name, tensor))
                    tensors[name] = used

    def leave(child: nn.Module, *_: object) -> None:
        while entered and any(entered[-1][0] is tensors for tensors in _own(child)):
            tensors, name, tensor = entered.pop()
            tensors[name] = tensor

    children = list(module.modules())
    handles = [child.register_forward_pre_hook(enter) for child in children]
    handles += [child.register_forward_hook(leave) for child in children]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensors, name, tensor in reversed(entered):
            tensors[name] = tensor


def _own(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers  # pyright: ignore[reportPrivateUsage] - to set a plain tensor there
