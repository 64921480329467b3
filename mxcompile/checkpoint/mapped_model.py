"""The module of a source whose tensors lie in files: nothing of it is in memory until it is used.

A tensor that a file of the source holds as it is in the model is mapped from there. Any other (experts that are stored
one by one, another dtype, decoded weights) is put together once, and its values are written to a file of their own.
"""

from torch import Tensor, nn

from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.errors import CheckpointError
from mxcompile.tensor.mapped_tensors import MappedTensors
from mxcompile.tensor.modules import set_tensors


def module_of(source: SourceFiles) -> nn.Module:
    """The source's module, the tensors of its files without values; raises CheckpointError if it has none."""
    if source.model is None:
        raise CheckpointError(
            f"{source.folder} holds no model of a class that transformers knows, and only such a model can be run from "
            "its files: use model-free quantization (quantize --model-free, mxcompile.quantize_files), or load the "
            "model and call quantize_and_compile"
        )
    return source.model


def mapped_model(source: SourceFiles, mapped: MappedTensors) -> nn.Module:
    """The source's module, filled, in eval mode. It is on the CPU, wherever `mapped` brings tensors to be used.

    Raises CheckpointError if the source has no module, or a file of it cannot be read.
    """
    model = module_of(source)
    tensors: dict[str, Tensor] = {}
    for name in source.names:
        first = source.aliases.get(name, name)
        tensors[name] = tensors[first] if first in tensors else _mapped(source, first, mapped)
    set_tensors(model, list(tensors.items()))
    return model


def _mapped(source: SourceFiles, name: str, mapped: MappedTensors) -> Tensor:
    shape, dtype, place = source.shape(name), source.dtype(name), source.place(name)
    if not mapped.is_large(dtype, shape):
        return source.tensor(name).clone()  # of its own: the file's pages are given back
    return mapped.keep(source.tensor(name)) if place is None else mapped.map_file(*place, dtype, shape)
