"""All that happens inside `torch.compile`: fusion of `mx::` operators, guards, and decode steps of `generate`."""

from mxcompile.inductor.compile import compile_module

__all__ = ["compile_module"]
