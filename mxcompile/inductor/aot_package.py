"""Exported program -> AOTInductor package that needs torch alone: `mx::` operators are decomposed into plain torch."""

import io
from collections.abc import Callable
from typing import Any, Final

import torch

from mxcompile import ops
from mxcompile.errors import CompileError
from mxcompile.inductor.backend import why_no_compiler
from mxcompile.inductor.private_api import aoti_compile_and_package, inductor_config

_DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    ops.QUANTIZE: ops.quantize,
    ops.DEQUANTIZE: ops.dequantize,
    ops.MULTIPLY: ops.multiply,
    ops.ROTATE: ops.rotate,
}


def write_package(exported: torch.export.ExportedProgram, archive: io.IOBase) -> None:
    """Compile for the device of the program's tensors and write the package.

    Raises CompileError if Inductor cannot compile for that device.
    """
    device = next((tensor.device for tensor in exported.state_dict.values()), torch.device("cpu"))
    if (reason := why_no_compiler(device)) is not None:
        raise CompileError(reason)
    decomposed = exported.run_decompositions(_DECOMPOSITIONS)
    # torch writes the package's metadata into this global setting, which is part of every cache key
    with inductor_config.patch({"aot_inductor.metadata": {}}):
        aoti_compile_and_package(decomposed, package_path=archive)  # pyright: ignore[reportArgumentType] - it accepts an IOBase
