"""Select the kernel of each MX weight of a module on a device, with the reasons against better ones."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.cache_sizes import cache_line
from mxcompile.checkpoint.interop.compressed_layers import by_reason, named_format, vllm_notes
from mxcompile.checkpoint.interop.element_layouts import STORED
from mxcompile.checkpoint.interop.joined_layers import different_by_name
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.diagnostics.explanation import (
    CPU,
    CPU_DECODED,
    FLOAT,
    FP8,
    LOOKUP,
    PLANES,
    UNFUSED,
    Explanation,
    SelectedKernel,
    group_similar,
)
from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, parse_format, parse_scale_rule
from mxcompile.inductor import notes_for_generate, why_no_inductor
from mxcompile.kernels.dispatch import choices, expert_choices, rounding_choices, why_not_fp8
from mxcompile.kernels.layout.planes import PlanarScaling, scaling_for
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight

_NO_KERNEL = "no fused kernel: the weight is {}-D, mx::linear takes 2-D weights and mx::grouped_linear 3-D ones"
_ASSUMED_SCALING = PlanarScaling(0, 1)
"""For a weight that does not exist yet: assume that its range of scales fits FP8 (e4m3)."""


def explain_quantized(model: nn.Module, device: torch.device) -> Explanation:
    """Explain a module that has MX weights."""
    layers, packed = tuple(_select_kernels(model, device)), stored_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in layers if layer.weight is not None)
    uncompiled, notes = why_no_inductor(device), (notes_for_vllm(layers), notes_for_generate(model))
    vllm, generate = notes
    generate = (*cache_lines(model, device), *generate)
    return Explanation(str(device), None, group_similar(layers), packed + saved, packed, uncompiled, vllm, generate)


def cache_lines(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """The format and size of the cache that `generate` makes, if it is not transformers' own, and how it is read."""
    provenance, config = Provenance.of(model), getattr(model, "config", None)
    if provenance is None or provenance.cache is None or config is None:
        return ()
    line = cache_line(config.get_text_config().to_dict(), provenance.cache)
    return (line,) if device.type == "cpu" else (line, _reading(provenance.cache))


def _reading(cache: CacheFormat) -> str:
    """When a GPU reads packed bytes, and when it decodes the whole cache first."""
    if cache.key is None or cache.value is None:
        why = f"{'keys' if cache.key is None else 'values'} stay in float"
        return f"attention runs on states that were decoded before it, which saves memory but no time: {why}"
    queries = "of up to a few tokens reads packed bytes"
    if cache.has_exact_tokens:
        queries = "of one token reads packed bytes, and exact tokens beside them,"
    return f"attention {queries}"


def notes_for_vllm(layers: Iterable[SelectedKernel]) -> tuple[str, ...]:
    """What vLLM cannot do with these layers, or does otherwise."""
    formats = {layer.pattern: named_format(layer.weight, layer.activation) for layer in layers}
    pairs = {(layer.weight, layer.activation) for layer in layers if layer.weight is not None}
    if not pairs:
        return ()
    writable = {None, *map(str, STORED.values())}
    is_writable = all(fmt in writable for pair in pairs for fmt in pair)
    notes = [f"saved as compressed-tensors: {note}" for note in (vllm_notes(pairs) if is_writable else ())]
    return (*notes, *by_reason(different_by_name(formats)))


def _select_kernels(model: nn.Module, device: torch.device) -> Iterator[SelectedKernel]:
    """One entry for each MX weight of a module and for each float weight of a linear or router."""
    seen: set[int] = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        if id(weight) in seen or not isinstance(weight, MXWeight):
            is_linear = name.endswith("weight") and weight.dim() == 2 and not isinstance(owner, nn.Embedding)
            if is_linear and id(weight) not in seen:
                seen.add(id(weight))
                reasons = ("it stayed in float when the model was quantized",)
                size = weight.numel() * weight.element_size()
                yield SelectedKernel(
                    layer_name(name), 1, tuple(weight.shape), None, None, FLOAT, FLOAT, reasons, size, size
                )
            continue
        seen.add(id(weight))
        spec = weight.layout_
        if isinstance(owner, nn.Embedding):
            selected = SelectedKernel(layer_name(name), 1, (), spec.format, None, LOOKUP, LOOKUP, (), 0, 0)
        else:
            x = torch.empty((1, spec.size), dtype=weight.dtype, device=device)
            rounding = None if spec.activation is None else (spec.activation, str(spec.rule))
            unfused = None if weight.dim() in (2, 3) else _NO_KERNEL.format(weight.dim())
            fmt = parse_format(spec.format)
            of_shape = (weight.elements.shape[-2], weight.dim() == 3)
            selected = select_kernel(layer_name(name), x, of_shape, fmt, rounding, unfused, _scaling(weight))
        yield with_sizes(selected, weight, spec.size)


def select_kernel(
    name: str,
    x: Tensor,
    of_shape: tuple[int, bool],
    fmt: MXFormat,
    rounding: tuple[str, str] | None,
    unfused: str | None,
    scaling: PlanarScaling = _ASSUMED_SCALING,
) -> SelectedKernel:
    """The kernels that multiply x `[1, in]` and longer inputs by a weight `[out, in]` of a format, with the reasons.

    of_shape: out, and whether there are many such weights, of which each token chooses some.
    rounding: format and scale rule of the input, None if it stays float.
    unfused: why the matmul is not fused, None if it is. Shape and bytes are filled in by `with_sizes`.
    """
    reasons: list[str] = []
    if rounding is not None:
        candidates = rounding_choices(x, parse_format(rounding[0]), parse_scale_rule(rounding[1]))
        reasons += [f"rounding of its input: {why}" for why in _refusals(candidates)]
    if unfused is not None:
        decode = prefill = UNFUSED
        reasons.append(unfused)
    else:
        out, experts = of_shape
        candidates = (expert_choices if experts else choices)(x, fmt, out)
        decode = prefill = next(name for name, reason in candidates.items() if reason is None)
        reasons += _refusals(candidates)
    if decode == CPU:
        prefill = CPU_DECODED
    if decode == PLANES:
        both = rounding and (parse_format(rounding[0]), parse_scale_rule(rounding[1]))
        why = why_not_fp8(x, fmt, scaling, both)
        prefill = FP8 if why is None else PLANES
        reasons += [] if why is None else [f"no fp8: {why}"]
    return SelectedKernel(name, 1, (), str(fmt), rounding and rounding[0], decode, prefill, tuple(reasons), 0, 0)


def _refusals(candidates: dict[str, str | None]) -> list[str]:
    """Why the kernels preferred over the selected one do not run; kernels of other device types are not mentioned."""
    refusals: list[str] = []
    for name, reason in candidates.items():
        if reason is None:
            break
        if not reason.startswith("runs on"):
            refusals.append(f"no {name}: {reason}")
    return refusals


def with_sizes(selected: SelectedKernel, weight: Tensor, size: int, *, replaces_float: bool = True) -> SelectedKernel:
    """Add the shape and bytes of a weight whose blocks run along a dimension of `size`.

    replaces_float: False if something else still reads the float weight, so that its bytes are not saved.
    """
    fmt = parse_format(str(selected.weight))
    before = weight.numel() * weight.element_size() if replaces_float else 0
    after = fmt.storage_bytes(weight.numel() // size, size)
    return replace(selected, shape=tuple(weight.shape), bytes_before=before, bytes_after=after)


def layer_name(name: str) -> str:
    """The layer that a weight parameter belongs to."""
    return name.removesuffix(".weight")


def _scaling(weight: MXWeight) -> PlanarScaling:
    """The scaling of a weight in the planar layout, or the one that it would have there."""
    spec = weight.layout_
    if spec.planes is not None:
        return spec.planes
    fmt = parse_format(spec.format)
    try:
        return scaling_for(*weight.planar_scale_range(), fmt)
    except MXCompileError:
        return PlanarScaling(0, 0)
