"""What passes save of their finished parts in a resume folder, beside tensors: plain values, exact to the bit.

save_part(program, "0003", {"factors.0": factors}, [{"group": 0, "error": 0.25}])
load_part(program, "0003")  ->  the same tensors and notes, in a later run; None if it has to be computed
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, Rounding
from mxcompile.numerics.exact_packing import pack_exactly
from mxcompile.tensor.weight import MXLayout, MXWeight

Notes = Sequence[Mapping[str, Any]]


def save_part(program: Program, part: str, tensors: dict[str, Tensor], notes: Notes = ()) -> None:
    """Save a finished part of the running pass, if there is a resume folder. notes: values that JSON can hold."""
    if program.resume is not None:
        program.resume.save(part, tensors, [json.dumps(dict(note)) for note in notes])


def load_part(program: Program, part: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """A part that an interrupted run has saved, its tensors on the CPU; None if it has not, or without a folder."""
    saved = None if program.resume is None else program.resume.load(part)
    return None if saved is None else (saved[0], [json.loads(note) for note in saved[1]])


def save_rounded(program: Program, part: str, name: str, axis: int, notes: Notes) -> None:
    """Save a weight that has been rounded, packed. axis: the dimension that is contracted."""
    if program.resume is not None:
        save_part(program, part, _packed(program, name, axis), notes)


def load_rounded(program: Program, part: str, name: str, axis: int, fmt: MXFormat) -> list[dict[str, Any]] | None:
    """Round a weight as an interrupted run has; returns its notes, None if it has not come so far."""
    saved = load_part(program, part)
    if saved is None:
        return None
    _set_rounded(program, saved[0], name, axis, fmt)
    return saved[1]


def save_all_rounded(program: Program, part: str, axes: Mapping[str, int], notes: Notes) -> None:
    """`save_rounded` of several weights as one part. axes: by the weights' names."""
    if program.resume is not None:
        packed = {name: _packed(program, name, axis) for name, axis in axes.items()}
        tensors = {f"{kind}.{name}": tensor for name, parts in packed.items() for kind, tensor in parts.items()}
        save_part(program, part, tensors, notes)


def load_all_rounded(
    program: Program, part: str, axes: Mapping[str, int], formats: Mapping[str, MXFormat]
) -> list[dict[str, Any]] | None:
    """`load_rounded` of several weights that are one part. axes, formats: by the weights' names."""
    saved = load_part(program, part)
    if saved is None:
        return None
    for name, axis in axes.items():
        own = {kind: saved[0][f"{kind}.{name}"] for kind in ("elements", "scales")}
        _set_rounded(program, own, name, axis, formats[name])
    return saved[1]


def _packed(program: Program, name: str, axis: int) -> dict[str, Tensor]:
    stored, rounding = program.stored(name), program.rounded[name]
    if isinstance(stored, MXWeight):
        elements = stored.elements
    else:
        rows = stored if axis == -1 else stored.transpose(-1, -2)
        elements = pack_exactly(rows.detach(), rounding.scales.to(rows.device), rounding.format)
    return {"elements": elements, "scales": rounding.scales}


def _set_rounded(program: Program, packed: Mapping[str, Tensor], name: str, axis: int, fmt: MXFormat) -> None:
    elements, scales = (packed[key].to(program.device(name)) for key in ("elements", "scales"))
    stored = program.stored(name)
    if stored.dim() == 3:
        program.set_packed(name, elements, Rounding(fmt, scales), axis, stored.dtype)
    else:
        weight = MXWeight(elements, scales, MXLayout(str(fmt), int(stored.shape[axis])), stored.dtype)
        program.set_rounded(name, weight.dequantize(), Rounding(fmt, scales), axis)
