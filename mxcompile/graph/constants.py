"""Constants of a traced graph: tensors that forward reads other than as parameters and buffers by their names.

    read(lifted_tensor_0)  ->  read("up.weight")    where both are the same memory, held by the module a second time

A constant that is a parameter under another path (in a closure, in a list) gets its name back: quantization then
sees it. One that belongs to a module outside of the traced one is refused: the result would go on reading it.
"""

from collections.abc import Iterator
from types import FunctionType

from torch import Tensor, nn
from torch.fx import Node

from mxcompile.errors import TraceError
from mxcompile.graph.program import Program
from mxcompile.tensor.reachable import holders, reachable, storages


def resolve_constants(program: Program, model: nn.Module) -> None:
    """Rename constants that are the memory of a parameter or buffer of the traced copy of the model.

    Raises TraceError for one that the code of a class reads from outside of the model.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    reads = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    constants = [name for name in reads if name not in own and program.has_tensor(name)]
    outside = dict(_outside(model)) if constants else {}
    for name in constants:
        tensor = program.tensor(name)
        for place, other in outside.items():
            if _same_memory(tensor, other):
                raise TraceError(_outside_message(model, place, other))
        source = next((path for path, value in own.items() if _same_values(tensor, value)), None)
        if source is not None and set(holders(model, own[source])) - {*own}:
            _rename(program, reads, name, source)


def _rename(program: Program, reads: dict[str, Node], name: str, source: str) -> None:
    node, earlier = reads[name], reads.get(source)
    if earlier is not None:
        node.replace_all_uses_with(earlier)
        program.erase_tensor_node(node)
        return
    value = program.tensor(source) if program.has_tensor(source) else program.tensor(name)
    node.target = source
    program.set_tensor(source, value)
    reads[source] = node


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    return bool(set(storages(tensor)) & set(storages(other)))


def _same_values(tensor: Tensor, other: Tensor) -> bool:
    return (
        _same_memory(tensor, other)
        and tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )


def _outside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of modules, and parameters, that the methods of the model's classes read as globals or closures."""
    own = {id(value) for _, value in reachable(model)}
    classes = {kind for module in model.modules() for kind in type(module).__mro__ if kind.__module__ != nn.__name__}
    for kind in classes:
        for function in vars(kind).values():
            if isinstance(function, FunctionType):
                yield from _read_by(kind, function, own)


def _read_by(kind: type, function: FunctionType, own: set[int]) -> Iterator[tuple[str, Tensor]]:
    for path, value in reachable(function, f"{kind.__name__}.{function.__name__}"):
        if id(value) in own:
            continue
        if isinstance(value, nn.Parameter):
            yield path, value
        elif isinstance(value, nn.Module):
            yield from (
                (f"{path}.{name}", tensor) for name, tensor in (*value.named_parameters(), *value.named_buffers())
            )


def _outside_message(model: nn.Module, place: str, tensor: Tensor) -> str:
    return (
        f"{type(model).__name__} cannot be traced: {place} ({str(tensor.dtype).removeprefix('torch.')} "
        f"{tuple(tensor.shape)}) is no parameter or buffer of the model, so that it would stay float, and the result "
        "would go on reading it. Assign the module that holds it to an attribute, and read it from self"
    )
