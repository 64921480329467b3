"""Plan without a trace, for an architecture that mxcompile cannot trace: by shapes, names, and the modules if known.

Float tensors of two dimensions, and of three (experts), are quantized along their last one, but no embeddings, norms,
routers, convolutions and output heads. Name patterns of `include` and `exclude` come before that.
"""

import re
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.fused_experts import fused_tensors
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.checkpoint.save import SOURCE_CONFIG
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.errors import CoverageError
from mxcompile.formats import MXFormat, activation_rule
from mxcompile.graph.name_patterns import Selection, last_match
from mxcompile.model_free.plan import FilesPlan
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.modules import named_tensors, set_tensors
from mxcompile.tensor.weight import MXLayout, MXWeight

_KINDS: Final = {
    "a bias stays float": r"bias$",
    "an embedding stays float": r"embed|\bwte\b|\bwpe\b|position|token_type|rotary|tok_emb",
    "a norm stays float": r"norm|\bln_|layer_?scale",
    "a router stays float": r"router|(^|\.)gate\.(weight|wg)|\.gate$|gating",
    "the output head stays float": r"lm_head|(^|\.)(output|head|score|classifier|embed_out)\.weight$",
    "a convolution stays float": r"conv",
}


def plan_by_shapes(source: SourceFiles, pipeline: Pipeline, selection: Selection, why: str) -> FilesPlan:
    """The plan of a pipeline of `round-weights` and `lower-mx` alone. why: the reason why the model is not traced.

    Raises UnknownNameError for a pattern that matches no tensor, CoverageError if there is nothing to quantize.
    """
    (lowering,) = (current for current in pipeline.passes if isinstance(current, LowerMX))
    rounding = next((current.rule for current in pipeline.passes if isinstance(current, RoundWeights)), None)
    module = _empty(source)
    own = named_tensors(module)
    selection.check([*dict.fromkeys(name.rpartition(".")[0] for name in own), *own])
    transposed = {name: fused.transposed for name, fused in fused_tensors(module).items() if fused.leaf == "weight"}
    reasons: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for name, value in own.items():
        fmt = lowering.weight
        pattern = last_match(lowering.overrides, (name, name.rpartition(".")[0]))
        if pattern is not None:
            fmt = lowering.overrides[pattern]
        reason = _why_float(module, name, value, selection) if fmt is not None else f"override {pattern}=none"
        if reason is None and fmt is not None:
            weights[name] = _weight(value, fmt, lowering, transposed.get(name, False))
        elif reason is not None and value.dim() > 1:
            reasons[name] = reason
    if not weights:
        raise CoverageError(f"{source.folder} holds no matrix that would be quantized: name some with include")
    set_tensors(module, weights.items())
    Provenance(str(pipeline)).write_on(module)
    rule = rounding or lowering.weight_rule
    return FilesPlan(source, str(pipeline), module, rule, reasons=reasons, guessed=why)


def _empty(source: SourceFiles) -> nn.Module:
    """A module with the tensors of the files on the meta device: the model, or a tree of plain modules."""
    if source.model is not None:
        own = named_tensors(source.model)
        return copy_module(source.model, (), {id(value): _copied(value) for value in own.values() if value.is_meta})
    names: Any = source.config.get("architectures")
    kind = str(names[0]) if isinstance(names, list) and names else "Module"
    root = type(kind, (nn.Module,), {})()
    for name in source.names:
        *path, leaf = name.split(".")
        owner: nn.Module = root
        for part in path:
            child = dict(owner.named_children()).get(part)
            owner.add_module(part, child := nn.Module() if child is None else child)
            owner = child
        empty = torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")
        owner.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
    setattr(root, SOURCE_CONFIG, {key: value for key, value in source.config.items() if key != "quantization_config"})
    return root.eval()


def _copied(value: Tensor) -> Tensor:
    empty = torch.empty_like(value)
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _why_float(module: nn.Module, name: str, value: Tensor, selection: Selection) -> str | None:
    """The reason, None for a tensor to quantize."""
    owner, path = _owner(module, name), name.rpartition(".")[0]
    if value.dim() not in (2, 3) or not value.is_floating_point() or not isinstance(value, nn.Parameter):
        return "not a matrix or a stack of matrices"
    if selection.included(name, path):
        return None
    if selection.excluded(name, path):
        return "left in float: excluded"
    if isinstance(owner, nn.Embedding):
        return "an embedding stays float"
    if name in _output_heads(module):
        return "the output head stays float"
    return next((reason for reason, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE)), None)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _output_heads(module: Any) -> set[str]:
    get_head = getattr(module, "get_output_embeddings", None)
    weight = getattr(get_head() if callable(get_head) else None, "weight", None)
    return {name for name, value in named_tensors(module).items() if value is weight}


def _weight(value: Tensor, fmt: MXFormat, lowering: LowerMX, transposed: bool) -> MXWeight:
    shape = list(value.shape)
    if transposed:
        shape[-2:] = shape[-1], shape[-2]
    activation = lowering.activation
    rule = None if activation is None else lowering.activation_rule or activation_rule(activation)
    blocks = fmt.blocks(shape[-1])
    layout = MXLayout(
        str(fmt), shape[-1], transposed, None if activation is None else str(activation), rule and str(rule)
    )
    elements, scales = (
        torch.empty((*shape[:-1], width), dtype=torch.uint8, device="meta")
        for width in (blocks * fmt.block_bytes, blocks)
    )
    return MXWeight(elements, scales, layout, value.dtype)
