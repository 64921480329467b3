"""Launch a jit kernel; again for arguments of the same kinds, without what Triton repeats on every launch.

Before each launch Triton binds the arguments, derives from each what the kernel is compiled for, and looks up the
compiled kernel: in Python that takes as long as a small matmul on the GPU. The result is the same for arguments of the
same kinds, so the kernel that Triton compiled or found is launched itself the next time, as in Triton's tutorial on
fused softmax.
"""

# pyright: basic

from typing import Any, Final

import torch
from torch import Tensor

_MOST_KERNELS: Final = 8192
_PLAIN: Final = frozenset({int, float, bool, type(None)})
_compiled: dict[Any, tuple[Any, Any, list[Any]]] = {}
"""By kernel, device and kinds of arguments: the jit kernel, which keeps its id taken, the compiled one, and the values
of its constexpr arguments."""


def launch(kernel: Any, programs: int | tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a jit kernel on its first argument's device. constants: constexpr arguments, and compiler options.

    The first argument is a tensor or a TensorDescriptor. The constexpr arguments are the last ones of the kernel.
    """
    tensor = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0].base
    grid = (programs, 1, 1) if isinstance(programs, int) else (*programs, 1, 1)[:3]
    kinds = [argument if type(argument) in _PLAIN else _kind(argument) for argument in arguments]
    key = (id(kernel), tensor.get_device(), *constants.items(), *kinds)
    known = _compiled.get(key)
    with torch.cuda.device_of(tensor):
        if known is not None:
            known[1][grid](*arguments, *known[2])
            return
        compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= _MOST_KERNELS:
            _compiled.clear()
        _compiled[key] = kernel, compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel for: of a pointer the dtype and whether it is aligned to 16 bytes, of a descriptor
    the dtype, block and layout. Of a number the value, though Triton looks at divisibility by 16, and at 1, only."""
    if type(argument) in _PLAIN:
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return argument.base.dtype, tuple(argument.block_shape), argument.layout
