"""nn.Module + example inputs -> Program: the only caller of `torch.export.export`.

The trace is not decomposed: it keeps `aten.linear` and `aten.scaled_dot_product_attention`. Every input dimension is
dynamic where the model allows it. The user's module is not modified: a copy of its structure on the same tensors is
traced, in eval mode and without a key/value cache among its outputs.
"""

import functools
import inspect
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from mxcompile.arguments import checked
from mxcompile.errors import InputError, TraceError
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.callers_modes import without_callers_modes
from mxcompile.graph.constants import resolve_constants
from mxcompile.graph.dataflow import mutated_tensors
from mxcompile.graph.inputs import Inputs, as_inputs, map_leaves, named_leaves
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.program import Program, where
from mxcompile.graph.regions import inline_regions
from mxcompile.graph.traceable_copy import no_values, traceable_copy
from mxcompile.graph.varying_sizes import Attempt, attempts
from mxcompile.graph.vmap_regions import enclose_vmaps
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight

_PART = (
    "trace a submodule that can be traced (mxcompile.trace(model.encoder, ...)); or give example inputs without the "
    "one that is read there, such as an image: what only that input reaches stays float."
)
_LOOP = (
    "In a loop over experts, run each on the tokens that chose it, also if there are none: without an `if` on their "
    "number, and not over the chosen experts alone; or multiply by all in one torch.nn.functional.grouped_mm. Or "
)
_ADVICE = (
    "Try: replace Python control flow on tensor values with torch.where or torch.cond, and .item() with tensor "
    f"arithmetic; or {_PART}"
)


_ONE_DTYPE = {
    *(torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default),
    *(torch.ops.aten.bmm.default, torch.ops.aten.matmul.default),
}
_TENSORS = 'a tokenizer returns tensors with return_tensors="pt"; make others with torch.tensor'


@without_callers_modes()
@checked
def trace(
    model: nn.Module,
    example_inputs: object,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    allow_partial: bool = False,
) -> Program:
    """Trace a module to a Program.

    example_inputs: keyword arguments (a dict or a tokenizer's output), a tuple of positional ones, or a tensor.
    include, exclude, allow_partial: which matmuls are quantized, see `Selection`.
    Raises InputError if the model is quantized already or fails on the inputs without tracing, TraceError if it runs
    but cannot be traced.
    """
    if isinstance(model, nn.Module) and any(isinstance(parameter, MXWeight) for parameter in model.parameters()):  # pyright: ignore
        raise InputError(
            f"this {type(model).__name__} is quantized already: trace the float model that it was made from"
        )
    inputs = as_inputs(example_inputs).cloned()
    shadow = traceable_copy(model, inputs)
    graph_module = _export(shadow, inputs).module()
    _check_dtypes(graph_module.graph, shadow, inputs)
    program = Program(
        GraphModule(graph_module, graph_module.graph),
        inputs,
        output_heads=_output_heads(shadow),
        aliases=_aliases(shadow),
        selection=Selection(_patterns(include), _patterns(exclude), allow_partial),
    )
    inline_regions(program.graph_module)
    enclose_vmaps(program.graph_module)
    resolve_constants(program, shadow)
    _copy_mutated_buffers(program)
    _drop_dead_nodes(program)
    _check_selection(program, shadow)
    _check_indices(program)
    return program


def exported_program(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Export a module with dynamic sizes. A Hugging Face output becomes a dict, which loads without transformers.

    Raises InputError or TraceError, as `trace` does.
    """
    shadow = traceable_copy(model, inputs)
    forward = shadow.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return dict(output.items()) if isinstance(output, Mapping) else output

    shadow.forward = plain
    return _export(shadow, inputs)


def _patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _export(shadow: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    failure: Exception | None = None
    for attempt in attempts(inputs):
        try:
            return _export_once(shadow, attempt)
        except Exception as error:
            failure = error
    assert failure is not None
    _run_eagerly(shadow, inputs)
    module, location = _innermost_module(failure, shadow)
    raise TraceError(f"{type(shadow).__name__} cannot be traced: {location}: {_reason(failure, module)}") from failure


def _reason(failure: Exception, module: nn.Module) -> str:
    """The first line of an error of torch.export, and what to do. module: whose forward was running."""
    line = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    if "Couldn't swap" in line:  # what torch says of the parameters that it traces with
        return "a module is cast or moved (Module.to) while it runs: do that once, before. Or " + _PART
    if "data-dependent" in line and _has_experts(module):
        return f"{line}. {_LOOP}{_PART}"
    return f"{line}. {_ADVICE}"


def _has_experts(module: nn.Module) -> bool:
    """Whether a module has a list of modules, or weights for several in one parameter."""
    lists = any(isinstance(child, nn.ModuleList) for child in module.children())
    return lists or any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _export_once(shadow: nn.Module, attempt: Attempt) -> torch.export.ExportedProgram:
    """Under no_grad, so that a `with torch.no_grad()` inside the model leaves no nested graph."""
    args, kwargs = attempt.inputs.args, attempt.inputs.kwargs
    arguments = inspect.signature(shadow.forward).bind(*args, **kwargs).arguments
    shapes = map_leaves(attempt.dynamic_dimensions, dict(arguments))
    with torch.no_grad():
        return attempt.run(lambda: torch.export.export(shadow, args, kwargs, dynamic_shapes=shapes, strict=False))


def _check_dtypes(graph: Graph, shadow: nn.Module, inputs: Inputs) -> None:
    """Raise InputError if a matmul has operands of two dtypes, which tracing accepts, and the model fails of it."""
    for node in graph.nodes:
        values = [operand.meta.get("val") for operand in node.all_input_nodes]
        dtypes = {str(value.dtype).removeprefix("torch.") for value in values if isinstance(value, Tensor)}
        if node.target in _ONE_DTYPE and len(dtypes) > 1:
            try:
                _run_eagerly(shadow, inputs)
            except InputError as error:
                raise InputError(
                    f"{where(node)} multiplies {' by '.join(sorted(dtypes))}: cast the whole model and its "
                    f"inputs to one dtype (model.to). {error}"
                ) from error
            return


def _check_indices(program: Program) -> None:
    """Raise InputError if an input has indices outside of the table that it is looked up in: tracing reads no values,
    and on a GPU such a lookup ends the process's use of it."""
    values = bind_inputs(program, program.example)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        indices, rows = values.get(node.args[1]), node.args[0].meta["val"].shape[0]
        if isinstance(indices, Tensor) and indices.numel() and (indices.min() < 0 or indices.max() >= rows):
            raise InputError(
                f"the example input {node.args[1]} has indices from {int(indices.min())} to {int(indices.max())}, and "
                f"the table of {where(node)} has {rows} rows: is it of another tokenizer?"
            )


def _run_eagerly(shadow: nn.Module, inputs: Inputs) -> None:
    """Raise InputError if the model fails on the inputs without tracing. It runs with copies of buffers and inputs."""
    shadow = copy_module(shadow, shadow.parameters(), own_collections=True)
    inputs = inputs.cloned()
    try:
        with torch.no_grad():
            shadow(*inputs.args, **inputs.kwargs)
    except Exception as error:
        if without := [name for name, tensor in named_tensors(shadow).items() if tensor.is_meta]:
            raise InputError(no_values(without)) from error
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}".replace("torch.", "") for t in inputs.tensors())
        lists = {
            path.split(".")[1] for path, leaf in named_leaves((inputs.args, inputs.kwargs)) if _in_list(path, leaf)
        }
        advice = f". Input {', '.join(sorted(lists))} is a list of numbers: {_TENSORS}" if lists else ""
        raise InputError(
            f"{type(shadow).__name__} itself fails on the example inputs ({shapes}): {type(error).__name__}: {error}"
            + advice
        ) from error


def _in_list(path: str, leaf: object) -> bool:
    return isinstance(leaf, int | float) and path.count(".") > 1


def _innermost_module(error: BaseException, root: nn.Module) -> tuple[nn.Module, str]:
    """The deepest module of `root` whose forward was running when the error was raised, and `path (Class), line N`."""
    paths = {id(module): name for name, module in root.named_modules()}
    innermost, location = root, f"in {type(root).__name__}"
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in paths and frame.f_code.co_name == "forward":
            path = paths[id(module)] or "the top module"
            innermost, location = module, f"in {path} ({type(module).__name__}), line {line} of its forward"
    return innermost, location


def _output_heads(model: nn.Module) -> set[str]:
    """Names of the output embedding's weight, if the model has Hugging Face's `get_output_embeddings`."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return set()
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value is weight}


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each name of a tied parameter, all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _copy_mutated_buffers(program: Program) -> None:
    """Copy the buffers that forward mutates: a run of the graph must not change the user's."""
    for name in mutated_tensors(program.graph):
        program.set_tensor(name, program.tensor(name).detach().clone())


def _drop_dead_nodes(program: Program) -> None:
    """Drop nodes that compute nothing: metadata assertions and parameters that no node reads."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    program.drop_unread()


def _check_selection(program: Program, model: nn.Module) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    program.selection.check([*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False))])
