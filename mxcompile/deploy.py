"""Lowered Program -> a copy of the user's module whose quantized parameters are `MXWeight`s.

The graph is what counts: each lowered matmul says which parameter it reads, in which format, and how its input is
prepared; the same facts go into the MXWeight at that parameter's place. Parameters that passes rewrote in float (norms)
are carried over too. Nothing of the user's module is shared or changed.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from mxcompile.analysis.choice import slot
from mxcompile.analysis.folds.multiplier import digest, multiplier_of
from mxcompile.analysis.folds.rotation import rotation_of
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.checkpoint import adopt
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import DeployError
from mxcompile.graph.agreement import agreement_db, output_tensors
from mxcompile.graph.edit import BLOCK_AXIS
from mxcompile.graph.program import Program, Stage, where
from mxcompile.ops import ALIGN, DEQUANTIZE, QUANTIZE
from mxcompile.tensor.modules import own_tensors, place_all
from mxcompile.tensor.weight import MXLayout, MXWeight, step_by_step

M = TypeVar("M", bound=nn.Module)
_SUFFIX = "_elements"
_AGREEMENT_DB = 40.0
_EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class _Placement:
    """An MX weight that a node reads, the name of the module parameter it replaces, and the input's multiplier."""

    name: str
    elements: str
    scales: str
    layout: MXLayout
    dtype: torch.dtype
    reader: Node
    multiplier: str | None


def deploy(program: Program, model: M, *, check: bool = True) -> M:
    """A copy of `model`, of the same class and in eval mode, that computes what the lowered program computes.

    check: compare the two on the example inputs (one forward each).
    Raises DeployError if the program is not lowered, does not come from this model, uses one parameter in two ways, or
    if the copy does not compute what the program computes.
    """
    if program.stage is not Stage.LOWERED:
        raise DeployError(
            f"deploy takes a lowered program, this one is {program.stage.name.lower()}: end the pipeline with lower-mx "
            "(fusing happens inside torch.compile)"
        )
    weights = _placements(program)
    own = own_tensors(model)
    _check_names(program, weights, own)
    changed = _changed_tensors(program, own)
    replaced = {*weights, *changed}
    kept_by_another_name = {id(tensor) for name, tensor in own.items() if name not in replaced}
    memo: dict[int, Any] = {id(own[name]): own[name] for name in replaced if id(own[name]) not in kept_by_another_name}
    deployed = copy.deepcopy(model, memo)
    copies = {id(tensor): tensor.detach().clone() for tensor in changed.values()}
    place_all(deployed, [(name, copies[id(tensor)]) for name, tensor in changed.items()])
    place_all(deployed, [(name, _weight(program, placement)) for name, placement in weights.items()])
    adopt(deployed.requires_grad_(False).eval(), Provenance(" | ".join(record.spec for record in program.ledger)))
    if check:
        _check_agreement(program, deployed)
    return deployed


def _weight(program: Program, placement: _Placement) -> MXWeight:
    elements, scales = program.tensor(placement.elements), program.tensor(placement.scales)
    multiplier = None if placement.multiplier is None else program.tensor(placement.multiplier).detach()
    return MXWeight(elements, scales, placement.layout, placement.dtype, multiplier)


def _placements(program: Program) -> dict[str, _Placement]:
    placements: dict[str, _Placement] = {}
    for placement in _lowered_reads(program):
        known = placements.setdefault(placement.name, placement)
        if known.layout != placement.layout:
            raise DeployError(
                f"parameter {placement.name!r} is used in two ways: {where(known.reader)} has {known.layout}, "
                f"{where(placement.reader)} has {placement.layout}"
            )
    return placements


def _lowered_reads(program: Program) -> Iterator[_Placement]:
    for matmul in find_matmuls(program)[0]:
        aligned, rounded = _alignment(matmul.activation)
        activation, rule, value = _preparation(rounded)
        rotation = rotation_of(value)
        multiplier = multiplier_of(program, value if rotation is None else cast(Node, value.args[0]))
        if matmul.is_lowered:
            name = _digest(program, multiplier)
            layout = MXLayout(*_decoding(matmul.root), activation, rule, name, rotation, aligned)
            yield _placement(program, matmul.root, matmul.root.args[:2], matmul.node, layout, multiplier)
        elif multiplier is not None or rotation is not None:
            what = "multiplied" if rotation is None else "rotated"
            raise DeployError(
                f"{where(matmul.node)} reads a {what} input, but its weight stays float, and only an MX weight can "
                "carry that: quantize it, or leave it out of the pass that changed its input"
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
    parameter = elements.removesuffix(_SUFFIX)
    name = slot(program, parameter, reader) or parameter
    return _Placement(name, elements, scales, layout, cast(torch.dtype, root.args[4]), reader, multiplier)


def _decoding(root: Node) -> tuple[str, int, bool]:
    """What a weight's `mx::dequantize` says: format, size along the blocks, and whether they run along dimension -2."""
    return str(root.args[2]), cast(int, root.args[3]), root.meta.get(BLOCK_AXIS, -1) == -2


def _alignment(activation: Node) -> tuple[bool, Node]:
    """Whether a matmul's input is aligned, and the value before that."""
    if activation.target is not ALIGN:
        return False, activation
    rounded = cast(Node, activation.args[0])
    if rounded.target is not DEQUANTIZE:
        raise DeployError(
            f"{where(activation)} aligns something that is not quantized: only rounded inputs are aligned"
        )
    return True, rounded


def _preparation(activation: Node) -> tuple[str | None, str | None, Node]:
    """Format and scale rule of a matmul's input, None and None if it is not quantized, and the value before that."""
    if activation.target is not DEQUANTIZE:
        return None, None, activation
    elements = cast(Node, activation.args[0])
    quantize = cast(Node, elements.args[0])
    if quantize.target is not QUANTIZE:
        raise DeployError(f"{where(activation)} dequantizes something that mx::quantize did not make")
    return str(quantize.args[1]), str(quantize.args[2]), cast(Node, quantize.args[0])


def _digest(program: Program, multiplier: str | None) -> str | None:
    return None if multiplier is None else digest(program.tensor(multiplier))


def _check_names(program: Program, weights: dict[str, _Placement], own: dict[str, Tensor]) -> None:
    for name, placement in weights.items():
        shape = tuple(placement.reader.graph.find_nodes(op="get_attr", target=placement.elements)[0].meta["val"].shape)
        if name not in own or own[name].dim() != len(shape):
            raise DeployError(
                f"the program quantizes {name!r}, which {len(own)} parameters of the module do not include in that "
                "shape: deploy into the model that was traced"
            )
    del program


def _changed_tensors(program: Program, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the module that a pass has replaced in float, under all their names."""
    changed: dict[str, Tensor] = {}
    for name in program.parameter_names():
        if name in own and program.tensor(name) is not own[name]:
            changed.update(dict.fromkeys(program.aliases.get(name, (name,)), program.tensor(name)))
    return changed


def _check_agreement(program: Program, deployed: nn.Module) -> None:
    """Raise DeployError if the deployed module's outputs differ from the program's by more than float rounding.

    Where the trace has a mask a module may have none, and torch other kernels of attention for it: what these differ by
    grows from layer to layer where activations are rounded. So where outputs differ they are compared again without.
    """
    agreement, name = _agreement(program, deployed)
    if agreement < _AGREEMENT_DB:
        with sdpa_kernel(SDPBackend.MATH):
            agreement, name = _agreement(program, deployed)
    if agreement < _AGREEMENT_DB:
        raise DeployError(
            f"output {name} of the deployed module agrees with the lowered program's only to {agreement:.1f} dB: the "
            "module does something that the trace does not show (a branch, state)"
        )


def _agreement(program: Program, deployed: nn.Module) -> tuple[float, str]:
    example = program.example
    wanted = output_tensors(program(*example.args, **example.kwargs))
    with torch.no_grad(), step_by_step():
        given = output_tensors(deployed(*example.args, **example.kwargs))
    return agreement_db(wanted, given)
