"""Deployed module -> a `.pt2` file that runs without the model's Python code: a graph of `mx::` ops, or AOT-compiled.

A `torch.export` archive holds the fused graph and the packed weights; `torch.export.load` reads it after
`import mxcompile.ops`. An AOTInductor package has the reference implementation compiled in place of the `mx::` ops: it
needs torch alone, and no Python.
"""

import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.export.graph_signature import TensorArgument
from torch.fx import Node

from mxcompile.arguments import checked
from mxcompile.atomic_files import atomic_file, check_writable
from mxcompile.errors import CheckpointError, InputError
from mxcompile.graph.inputs import as_inputs
from mxcompile.graph.trace import exported_program
from mxcompile.inductor import compile_ahead
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.tensor.weight import MXWeight

_SUFFIX = ".pt2"


@checked
def export(model: nn.Module, example_inputs: object, path: str | Path, *, compile: bool = False) -> Path:
    """Write a deployed module to a file. Returns its path.

    model: the result of `quantize_and_compile` or `deploy`. example_inputs: in the forms that `trace` accepts; sizes
        may differ later where the model allows it.
    path: ends in .pt2; an existing file is replaced once the new one is complete.
    compile: False writes a `torch.export` archive, read by `torch.export.load(path).module()` after
        `import mxcompile.ops`. True compiles for the model's device; torch's `aoti_load_package(path)` and C++ read the
        package without mxcompile.

    The loaded model is called with the example's arguments and returns what `forward` returns: a Hugging Face output as
    a dict, without the key/value cache.
    Raises InputError if the model has no MX weights or fails on the inputs, or if the path has another suffix;
    CheckpointError if the file cannot be written; TraceError if the model cannot be traced; CompileError if it cannot
    be compiled on this machine.
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise InputError(f"{path}: the file of an exported model must end in {_SUFFIX}")
    if not any(isinstance(parameter, MXWeight) for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no MX weights: pass the result of quantize_and_compile or deploy")
    with _explained(path):
        check_writable(path, is_folder=False)
    exported = exported_program(model, as_inputs(example_inputs))
    with _explained(path), atomic_file(path) as staged, _archive(staged) as archive, torch.no_grad():
        if compile:
            compile_ahead(exported, archive)
        else:
            torch.export.save(_fused(exported), archive)  # pyright: ignore[reportArgumentType] - torch accepts an IOBase
    return path


class _Archive(io.RawIOBase):
    """A file for torch's archive writer, which ends the process if a write fails: it is told that each succeeds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # torch asks, and goes back to the start when all is written

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return offset

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextmanager
def _archive(path: Path) -> Generator[_Archive]:
    """A file to which torch writes an archive; raises OSError at the end if a write failed."""
    with path.open("wb") as file:
        archive = _Archive(file)
        yield archive
        if archive.error is not None:
            raise archive.error


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """OSErrors as CheckpointErrors."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}): make room, or name another place") from error


def _fused(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The graph with MX weights as their component tensors, read by fused ops; outputs keep their order."""
    plain = exported.run_decompositions({})
    fuse(plain.graph)
    results = plain.graph.output_node().args[0]
    for spec, node in zip(plain.graph_signature.output_specs, results, strict=True):  # pyright: ignore[reportArgumentType]
        if isinstance(node, Node):
            spec.arg = TensorArgument(node.name) if isinstance(spec.arg, TensorArgument) else spec.arg
    plain.graph_module.recompile()
    return plain
