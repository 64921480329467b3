"""Deployed module -> a file that runs without its Python code: a graph of `mx::` calls, or compiled ahead of time.

A `.pt2` archive of `torch.export` holds the fused graph and the packed weights; `torch.export.load` reads it wherever
`mxcompile.ops` is imported. Compiled by AOTInductor, the steps of the reference are all that is left of the `mx::`
calls: the package needs torch alone, and no Python.
"""

from pathlib import Path

import torch
from torch import nn
from torch.export.graph_signature import TensorArgument
from torch.fx import Node

from mxcompile.checkpoint.atomic_files import atomic_file
from mxcompile.errors import InputError
from mxcompile.graph.inputs import as_inputs
from mxcompile.graph.trace import exported_program
from mxcompile.inductor import compile_ahead
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.tensor.weight import MXWeight

_SUFFIX = ".pt2"


def export(model: nn.Module, example_inputs: object, path: str | Path, *, compile: bool = False) -> Path:
    """Write a deployed module to a file. Returns its path.

    model: what `quantize_and_compile` or `deploy` has returned. example_inputs: as `trace` takes them; sizes may differ
        later where the model allows it.
    path: ends in .pt2; a file that is there is replaced when the new one is whole.
    compile: False writes a `torch.export` archive, read by `torch.export.load(path).module()` after
        `import mxcompile.ops`. True compiles for the device of the model; torch's `aoti_load_package(path)` reads that
        without mxcompile, and so does C++.

    Both are called with the example's arguments and return what `forward` returns, a Hugging Face output as a dict, and
    without its key/value cache.
    Raises InputError if the model holds no MX weights or fails on the inputs, or if the path ends in something else;
    TraceError if it cannot be traced; CompileError if it cannot be compiled here.
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise InputError(f"{path}: the archive of an exported model ends in {_SUFFIX}")
    if not any(isinstance(parameter, MXWeight) for parameter in model.parameters()):
        raise InputError(
            f"{type(model).__name__} holds no MX weights: give what quantize_and_compile or deploy has returned"
        )
    exported = exported_program(model, as_inputs(example_inputs))
    with atomic_file(path) as staged, torch.no_grad():
        if compile:
            compile_ahead(exported, staged)
        else:
            torch.export.save(_fused(exported), staged)
    return path


def _fused(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """With MX weights as the tensors they are made of, read by fused calls; results keep their places."""
    plain = exported.run_decompositions({})
    fuse(plain.graph)
    results = plain.graph.output_node().args[0]
    for spec, node in zip(plain.graph_signature.output_specs, results, strict=True):  # pyright: ignore[reportArgumentType]
        if isinstance(node, Node):
            spec.arg = TensorArgument(node.name) if isinstance(spec.arg, TensorArgument) else spec.arg
    plain.graph_module.recompile()
    return plain
