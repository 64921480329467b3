"""Where a matmul with an MX weight must be the separate operators of a lowered Program, or only its shapes count."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_STEP_BY_STEP: ContextVar[bool] = ContextVar("mxcompile.unfused_matmuls", default=False)


def is_traced(x: Tensor) -> bool:
    """Whether every step must be an operator of its own: in `torch.compile` and `torch.export` (in Dynamo or, in
    torch 2.11, in later stages), or under `unfused_matmuls`.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor or _STEP_BY_STEP.get()


def is_for_shapes(x: Tensor) -> bool:
    """Whether operators on x run for the shapes of their results alone, and none of them is recorded: so Dynamo runs
    each call of a model that it traces."""
    return type(x) is FakeTensor and get_proxy_mode() is None


def is_step_by_step() -> bool:
    """Whether `unfused_matmuls` is in force; never while a graph is traced, which Dynamo could not ask."""
    return not torch.compiler.is_compiling() and _STEP_BY_STEP.get()


def needs_gradient(x: Tensor) -> bool:
    """Whether a backward pass will ask for the gradient of x."""
    return torch.is_grad_enabled() and x.requires_grad


@contextmanager
def unfused_matmuls() -> Generator[None]:
    """Run matmuls with MX weights as the separate operators of a lowered Program, without the fused kernels, which
    accumulate in another order.
    """
    token = _STEP_BY_STEP.set(True)
    try:
        yield
    finally:
        _STEP_BY_STEP.reset(token)
