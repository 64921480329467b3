"""What multiplies each MX weight of a module on a device, and why nothing better does."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mxcompile.diagnostics.explanation import (
    CPU,
    CPU_DECODED,
    FLOAT,
    FP8,
    LOOKUP,
    PLANES,
    UNFUSED,
    Explanation,
    Served,
    grouped,
)
from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, input_text, parse_format, parse_scale_rule
from mxcompile.inductor.backend import why_no_inductor
from mxcompile.kernels.dispatch import choices, rounding_choices, why_not_fp8
from mxcompile.kernels.layout.planes import Scaling, scaling_for
from mxcompile.kernels.layout.rows_to_planes import range_of_rows
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight

_NO_2D = "no fused kernel: the weight is {}-D, mx::linear takes 2-D weights; it is dequantized first"
_LIKELY = Scaling(0, 1)
"""Of a weight that is not there: that its scales are not too far apart for e4m3 numbers."""


def explain_quantized(model: nn.Module, device: torch.device) -> Explanation:
    """`explain` of a module with MX weights."""
    layers, packed = tuple(of_quantized(model, device)), stored_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in layers if layer.weight is not None)
    return Explanation(str(device), None, grouped(layers), packed + saved, packed, why_no_inductor(device))


def of_quantized(model: nn.Module, device: torch.device) -> Iterator[Served]:
    """The MX weights of a module, and the float ones of its `nn.Linear`s."""
    seen: set[int] = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        if id(weight) in seen or not isinstance(weight, MXWeight):
            if isinstance(owner, nn.Linear) and weight.dim() == 2 and id(weight) not in seen:
                seen.add(id(weight))
                reasons = ("it was left in float when the model was quantized",)
                size = weight.numel() * weight.element_size()
                yield Served(short_name(name), 1, tuple(weight.shape), None, None, FLOAT, FLOAT, reasons, size, size)
            continue
        seen.add(id(weight))
        spec = weight.layout_
        if isinstance(owner, nn.Embedding):
            served = Served(short_name(name), 1, (), spec.format, None, LOOKUP, LOOKUP, (), 0, 0)
        else:
            x = torch.empty((1, spec.size), dtype=weight.dtype, device=device)
            rounding = None if spec.activation is None else (spec.activation, str(spec.rule))
            unfused = None if weight.dim() == 2 else _NO_2D.format(weight.dim())
            out = weight.numel() // spec.size
            fmt = parse_format(spec.format)
            served = served_by(short_name(name), x, out, fmt, rounding, unfused, spec.aligned, _scaling(weight))
        yield sized(served, weight, spec.size)


def served_by(
    name: str,
    x: Tensor,
    out: int,
    fmt: MXFormat,
    rounding: tuple[str, str] | None,
    unfused: str | None,
    aligned: bool = False,
    scaling: Scaling = _LIKELY,
) -> Served:
    """What multiplies x `[1, in]` by a weight of that format, and its reasons; sizes are filled in by `sized`.

    rounding: format and scale rule of the input, None for float. aligned: whether it is aligned then. unfused: why no
    fused kernel serves, if none does.
    """
    reasons: list[str] = []
    if rounding is not None:
        answers = rounding_choices(x, parse_format(rounding[0]), parse_scale_rule(rounding[1]))
        reasons += [f"rounding of its input: {why}" for why in _refusals(answers)]
    if unfused is not None:
        decode = prefill = UNFUSED
        reasons.append(unfused)
    else:
        answers = choices(x, fmt, out)
        decode = prefill = next(name for name, reason in answers.items() if reason is None)
        reasons += _refusals(answers)
    if decode == CPU:
        prefill = CPU_DECODED
    if decode == PLANES:
        both = rounding and (parse_format(rounding[0]), parse_scale_rule(rounding[1]))
        why = why_not_fp8(x, fmt, scaling, both, aligned)
        prefill = FP8 if why is None else PLANES
        reasons += [] if why is None else [f"no fp8: {why}"]
    activation = input_text(rounding and rounding[0], aligned)
    return Served(name, 1, (), str(fmt), activation, decode, prefill, tuple(reasons), 0, 0)


def _refusals(answers: dict[str, str | None]) -> list[str]:
    """Why the kernels in front of the one that serves do not; those of another kind of device go without saying."""
    found: list[str] = []
    for name, reason in answers.items():
        if reason is None:
            break
        if not reason.startswith("runs on"):
            found.append(f"no {name}: {reason}")
    return found


def sized(served: Served, weight: Tensor, size: int, *, alone: bool = True) -> Served:
    """With the sizes of a weight, whose blocks run along a dimension of that size; not alone: the float one stays."""
    fmt = parse_format(str(served.weight))
    before = weight.numel() * weight.element_size() if alone else 0
    after = fmt.storage_bytes(weight.numel() // size, size)
    return replace(served, shape=tuple(weight.shape), bytes_before=before, bytes_after=after)


def short_name(name: str) -> str:
    """The layer that a parameter is the weight of."""
    return name.removesuffix(".weight")


def _scaling(weight: MXWeight) -> Scaling:
    """Of a weight in planes, or that it would have there."""
    spec = weight.layout_
    if spec.planes is not None:
        return spec.planes
    fmt = parse_format(spec.format)
    try:
        return scaling_for(*range_of_rows(weight.elements, weight.scales, fmt, spec.size), fmt)
    except MXCompileError:
        return Scaling(0, 0)
