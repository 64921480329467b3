"""Lowered Program -> a copy of the user's module whose quantized parameters are `MXWeight`s.

Everything is read from the graph: each lowered matmul states its parameter, the format, and how its input is prepared.
The same goes into the MXWeight that replaces the parameter. Float parameters that passes changed (norms) are copied
too. Nothing of the user's module is shared or changed. Buffers that forward writes to have
the user's values: the returned module has never run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from mxcompile.analysis.attentions import with_exact_cache
from mxcompile.analysis.choice import name_in_module
from mxcompile.analysis.folds.multiplier import multiplier_digest, multiplier_of
from mxcompile.analysis.folds.rotation import rotation_of
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.analysis.visibility import output_masks, without_hidden
from mxcompile.arguments import checked
from mxcompile.checkpoint import mark_quantized
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import DeployError
from mxcompile.graph.agreement import agreement_db, check_repeatable, compared_outputs
from mxcompile.graph.callers_modes import without_callers_modes
from mxcompile.graph.dataflow import mutated_tensors
from mxcompile.graph.edit import BLOCK_AXIS, PACKS, parameter_name
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program, Stage, float_values, where
from mxcompile.ops import DEQUANTIZE, QUANTIZE
from mxcompile.tensor.copying import copy_module, shared_with
from mxcompile.tensor.fetched_modules import tensors_fetched
from mxcompile.tensor.mapped_tensors import MappedTensors
from mxcompile.tensor.modules import named_tensors, set_tensors
from mxcompile.tensor.reachable import reachable, storage_names
from mxcompile.tensor.weight import MXLayout, MXWeight, unfused_matmuls

M = TypeVar("M", bound=nn.Module)
_AGREEMENT_DB = 40.0
_EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class _Placement:
    """An MX weight that a node reads, and the name of the module parameter that it replaces.

    elements, scales, multiplier (of the input): names of tensors of the program. reader: the node.
    """

    name: str
    elements: str
    scales: str
    layout: MXLayout
    dtype: torch.dtype
    reader: Node
    multiplier: str | None


@without_callers_modes()
@checked
def deploy(program: Program, model: M, *, check: bool = True) -> M:
    """A copy of `model`, of the same class and in eval mode, that computes the same as the lowered program.

    check: compare the outputs of both on the example inputs (one forward each).
    Raises DeployError if the program is not lowered, was not traced from this model or uses one parameter in two ways,
    or if the outputs differ.
    """
    deployed = placed(program, model)
    _mark(program, deployed)
    if check:
        _check_agreement(program, deployed)
    return deployed


def placed(program: Program, model: M) -> M:
    """The module that `deploy` makes, before transformers is told that it is quantized: to be saved, not to be run.

    Tensors of the program and of the model may be on the meta device. Raises DeployError as `deploy` does.
    """
    own, weights = _checked_placements(program, model)
    replacements = _replacements(program, own, weights, _copied, _itself)
    deployed = _with_replacements(model, own, replacements).requires_grad_(False).eval()
    _check_nothing_shared(deployed, model)
    _provenance(program).write_on(deployed)
    return deployed


@checked
def deploy_in_files(program: Program, model: M, *, check: bool = True) -> M:
    """`deploy` for a program and a model whose tensors lie in files: into the model itself, which is returned.

    Nothing is copied: the model then reads the program's tensors. It stays on the CPU, and runs where the program does
    for the check. Raises DeployError as `deploy` does; the model has changed even so if the outputs differ.
    """
    if program.mapped is None:
        raise DeployError("deploy_in_files needs a program whose tensors lie in files (Program.keep_in_files)")
    own, weights = _checked_placements(program, model)

    def on_cpu(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()

    set_tensors(model, _replacements(program, own, weights, on_cpu, on_cpu).items())
    _mark(program, model)
    if check:
        _check_agreement(program, model)
    return model


def _checked_placements(program: Program, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, _Placement]]:
    """The model's tensors, and what becomes of them; raises DeployError if the program does not fit them."""
    if program.stage is not Stage.LOWERED:
        raise DeployError(
            f"deploy needs a lowered program, this one is {program.stage.name.lower()}: end the pipeline with lower-mx "
            "(torch.compile fuses the MX ops)"
        )
    weights = _placements(program)
    own = named_tensors(model)
    _check_names(program, weights, own)
    return own, weights


def _mark(program: Program, deployed: nn.Module) -> None:
    mark_quantized(deployed.requires_grad_(False).eval(), _provenance(program))


def _provenance(program: Program) -> Provenance:
    return Provenance(" | ".join(record.spec for record in program.ledger), cache=program.cache)


def _replacements(
    program: Program,
    own: dict[str, Tensor],
    weights: dict[str, _Placement],
    take: Callable[[Tensor], Tensor],
    take_part: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What each name of the module gets instead of its tensor: an MX weight, or what passes made of it.

    take, take_part: what the module gets of a float tensor of the program, and of a packed weight's components.
    """
    copies: dict[int, Tensor] = {}
    replacements: dict[str, Tensor] = {}
    for name, tensor in _changed_tensors(program, own).items():
        value = copies.setdefault(id(tensor), take(tensor))
        if isinstance(own[name], nn.Parameter) and not isinstance(value, nn.Parameter):
            value = copies[id(tensor)] = nn.Parameter(value, requires_grad=False)
        replacements[name] = value
    for name, placement in weights.items():
        replacements[name] = nn.Parameter(_weight(program, placement, take_part), requires_grad=False)
    return replacements


def _with_replacements(model: M, own: dict[str, Tensor], replacements: dict[str, Tensor]) -> M:
    """A copy of the module in which each tensor is replaced wherever the module holds it, also in lists and closures.

    The names of a tied tensor may get different ones: then those names alone do.
    """
    values: dict[int, set[int]] = {}
    for name, tensor in own.items():
        values.setdefault(id(tensor), set()).add(id(replacements.get(name)))
    one = {id(own[name]): value for name, value in replacements.items() if len(values[id(own[name])]) == 1}
    still_used = {id(tensor) for name, tensor in own.items() if name not in replacements}
    split = [own[name] for name in replacements if id(own[name]) not in {*one, *still_used}]
    deployed = copy_module(model, split, one)
    set_tensors(deployed, replacements.items())
    return deployed


def _check_nothing_shared(deployed: nn.Module, model: nn.Module) -> None:
    if found := shared_with(deployed, storage_names(reachable(model))):
        raise DeployError(
            f"{found[0]!r} of the deployed {type(model).__name__} would be the memory of {found[1]!r} of the model "
            "itself: register it as a parameter or buffer, or copy it where it is set"
        )


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _weight(program: Program, placement: _Placement, take: Callable[[Tensor], Tensor]) -> MXWeight:
    elements, scales = take(program.stored(placement.elements)), take(program.stored(placement.scales))
    multiplier = None if placement.multiplier is None else take(program.stored(placement.multiplier).detach())
    return MXWeight(elements, scales, placement.layout, placement.dtype, multiplier)


def _placements(program: Program) -> dict[str, _Placement]:
    placements: dict[str, _Placement] = {}
    for placement in _lowered_reads(program):
        earlier = placements.setdefault(placement.name, placement)
        if earlier.layout != placement.layout:
            raise DeployError(
                f"parameter {placement.name!r} is used in two ways: {where(earlier.reader)} has {earlier.layout}, "
                f"{where(placement.reader)} has {placement.layout}"
            )
    return placements


def _lowered_reads(program: Program) -> Iterator[_Placement]:
    for matmul in find_matmuls(program)[0]:
        activation, rule, value = _preparation(matmul.activation)
        rotation = rotation_of(value)
        multiplier = multiplier_of(program, value if rotation is None else cast(Node, value.args[0]))
        if matmul.is_lowered:
            name = _digest(program, multiplier)
            layout = MXLayout(*_decoding(matmul.root), activation, rule, name, rotation)
            yield _placement(program, matmul.root, matmul.root.args[:2], matmul.node, layout, multiplier)
        elif multiplier is not None or rotation is not None:
            preparation = "multiplied" if rotation is None else "rotated"
            raise DeployError(
                f"{where(matmul.node)} reads a {preparation} input, but its weight stays float, and only an MX weight "
                "can prepare its input: quantize it, or exclude it from the pass that changed its input"
            )
    for node in program.graph.nodes:
        lookups = node.args[:2] if node.target is DEQUANTIZE else ()
        if lookups and all(lookup.target is _EMBEDDING for lookup in lookups):
            tables = [lookup.args[0] for lookup in lookups]
            yield _placement(program, node, tables, lookups[0], MXLayout(*_decoding(node)), None)


def _placement(
    program: Program, root: Node, parts: Any, reader: Node, layout: MXLayout, multiplier: str | None
) -> _Placement:
    elements, scales = (str(part.target) for part in parts)
    parameter = parameter_name(parts[0])
    name = name_in_module(program, parameter, reader) or parameter
    return _Placement(name, elements, scales, layout, cast(torch.dtype, root.args[4]), reader, multiplier)


def _decoding(root: Node) -> tuple[str, int, bool]:
    """Arguments of a weight's `mx::dequantize`: format, size along blocks, whether blocks are along dimension -2."""
    return str(root.args[2]), cast(int, root.args[3]), root.meta.get(BLOCK_AXIS, -1) == -2


def _preparation(activation: Node) -> tuple[str | None, str | None, Node]:
    """Format and scale rule of a matmul's input (None if it is not quantized), and the value before quantization."""
    if activation.target is not DEQUANTIZE:
        return None, None, activation
    elements = cast(Node, activation.args[0])
    quantize = cast(Node, elements.args[0])
    if quantize.target is not QUANTIZE:
        raise DeployError(f"{where(activation)} dequantizes a value that is no output of mx::quantize")
    return str(quantize.args[1]), str(quantize.args[2]), cast(Node, quantize.args[0])


def _digest(program: Program, multiplier: str | None) -> str | None:
    return None if multiplier is None else multiplier_digest(program.tensor(multiplier))


def _check_names(program: Program, weights: dict[str, _Placement], own: dict[str, Tensor]) -> None:
    """Raise DeployError unless the module has every quantized parameter, and its tensors have the traced shapes."""
    shapes = {name: _float_shape(program, placement) for name, placement in weights.items()}
    packed = _packed_tensors(program)
    for name in program.parameter_names():
        if name in own and name not in packed:
            shapes.setdefault(name, program.stored(name).shape)
    for name, shape in shapes.items():
        if name not in own:
            raise DeployError(
                f"the program quantizes {name!r}, but none of the module's {len(own)} tensors has that name: deploy "
                "into the model that was traced"
            )
        if own[name].shape != shape:
            raise DeployError(
                f"the module's {name!r} is {list(own[name].shape)}, the program's {list(shape)}: deploy into the model "
                "that was traced"
            )


def _float_shape(program: Program, placement: _Placement) -> torch.Size:
    """Shape of the parameter that an MX weight replaces."""
    shape = [*program.stored(placement.elements).shape[:-1], placement.layout.size]
    if placement.layout.transposed:
        shape[-2:] = shape[-1], shape[-2]
    return torch.Size(shape)


def _packed_tensors(program: Program) -> set[str]:
    """Names of elements and scales."""
    return {str(node.target) for node in program.graph.find_nodes(op="get_attr") if PACKS in node.meta}


def _changed_tensors(program: Program, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a pass changed in float, under all their names in the module; not those that forward writes to."""
    changed: dict[str, Tensor] = {}
    others = {*mutated_tensors(program.graph), *_packed_tensors(program)}
    for name in program.parameter_names():
        if name in own and name not in others and program.stored(name) is not own[name]:
            changed.update(dict.fromkeys(program.aliases.get(name, (name,)), float_values(program.stored(name))))
    return changed


def _check_agreement(program: Program, deployed: nn.Module) -> None:
    """Raise DeployError if the deployed module's outputs differ from the program's by more than float rounding.

    The trace may have an attention mask where the module has none, and torch then runs different SDPA kernels. With
    quantized activations their rounding differences grow from layer to layer. So if outputs differ, both are compared
    again with the math backend of SDPA. The module's own forward has no cache, so keys and values are compared exact.
    """
    program = with_exact_cache(program)
    agreement, name = _agreement(program, deployed)
    if agreement < _AGREEMENT_DB:
        with sdpa_kernel(SDPBackend.MATH):
            agreement, name = _agreement(program, deployed)
    if agreement < _AGREEMENT_DB:
        example = program.example
        check_repeatable(program, lambda: program(*example.args, **example.kwargs), _AGREEMENT_DB)
        check_repeatable(program, lambda: _run(copy_module(deployed, deployed.parameters()), example), _AGREEMENT_DB)
        raise DeployError(
            f"output {name} of the deployed module agrees with the lowered program's only to {agreement:.1f} dB "
            f"(required: {_AGREEMENT_DB:.0f} dB): the module does something that the trace does not show (a branch, "
            "state)"
        )


def _agreement(program: Program, deployed: nn.Module) -> tuple[float, str]:
    """Compare the visible rows of outputs. Both run from the state that the module is in.

    A twin with buffers of its own runs in the module's place.
    """
    example = program.example.cloned()
    twin = copy_module(deployed, deployed.parameters())
    buffers = dict(twin.named_buffers(remove_duplicate=False))
    for name in mutated_tensors(program.graph):
        if name in buffers:
            program.set_tensor(name, buffers[name].detach().clone())
    masks = output_masks(program, example)
    expected = without_hidden(compared_outputs(program(*example.args, **example.kwargs)), masks)
    with _on_device(twin, program.mapped):
        actual = without_hidden(compared_outputs(_run(twin, example)), masks)
    return agreement_db(expected, actual)


def _on_device(module: nn.Module, mapped: MappedTensors | None) -> AbstractContextManager[None]:
    """In which a module with tensors in files runs where the program does."""
    return nullcontext() if mapped is None else tensors_fetched(module, mapped.fetch)


def _run(module: nn.Module, example: Inputs) -> Any:
    example = example.cloned()
    with torch.no_grad(), unfused_matmuls():
        return module(*example.args, **example.kwargs)
