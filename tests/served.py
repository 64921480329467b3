"""Tiny quantized models that vLLM can run, with what a checkpoint may say of a layer; made without a trace."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.analysis.folds.multiplier import multiplier_digest
from mxcompile.checkpoint import mark_quantized
from mxcompile.numerics.block_transforms import undo_in_weight
from mxcompile.numerics.hadamard import rotate_weight
from mxcompile.ops import QUANTIZE
from mxcompile.tensor.layout import MXLayout
from mxcompile.tensor.modules import set_tensors
from mxcompile.tensor.weight import MXWeight

VOCABULARY: Final = 512


@dataclass(frozen=True)
class Spec:
    """How one linear layer is quantized."""

    weight: str = "mxint4"
    activation: str | None = "mxint8"
    rotation: int | None = None
    multiplier: int | None = None  # a seed: equal seeds, equal values
    run: int | None = None  # the multiplier is a matrix for each run of so many channels


def tiny_llama(seed: int = 0, **sizes: Any) -> nn.Module:
    """A random Llama of sizes that vLLM's attention supports, in bfloat16; the same weights for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    given = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCABULARY, **heads, **sizes}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**given, max_position_embeddings=128)).to(torch.bfloat16).eval()


def quantized(model: nn.Module, specs: Mapping[str, Spec]) -> nn.Module:
    """The model, changed: each linear whose name ends with a key of `specs` gets MX weights."""
    replaced: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        spec = next((spec for ending, spec in specs.items() if name.endswith(ending)), None)
        if spec is not None and isinstance(module, nn.Linear):
            replaced.append((f"{name}.weight", mx_weight(module.weight.detach(), spec)))
    set_tensors(model, replaced)
    mark_quantized(model.requires_grad_(False), None)
    return model


def mx_weight(values: Tensor, spec: Spec) -> MXWeight:
    """A float weight `[out, in]` as the spec says."""
    size, multiplier = values.shape[1], None
    rows = values.float()
    if spec.run is not None:
        multiplier = _matrices(size // spec.run, spec.run, spec.multiplier or 0).to(values.dtype)
        rows = undo_in_weight(rows, multiplier)
    elif spec.multiplier is not None:
        generator = torch.Generator().manual_seed(spec.multiplier)
        multiplier = torch.exp2(torch.randint(-2, 3, (size,), generator=generator).float()).to(values.dtype)
        rows = rows / multiplier.float()
    rows = rows if spec.rotation is None else rotate_weight(rows, spec.rotation)
    elements, scales = QUANTIZE(rows, spec.weight, "floor")
    digest = None if multiplier is None else multiplier_digest(multiplier)
    rule = None if spec.activation is None else "floor"
    layout = MXLayout(spec.weight, size, False, spec.activation, rule, digest, spec.rotation)
    return MXWeight(elements, scales, layout, values.dtype, multiplier)


def _matrices(count: int, run: int, seed: int) -> Tensor:
    noise = torch.randn(count, run, run, generator=torch.Generator().manual_seed(seed))
    return torch.eye(run) + 0.1 * noise


def with_float_inputs(model: nn.Module) -> nn.Module:
    """The model, changed: its MX layers do not round their inputs."""
    weights = [(name, value) for name, value in model.named_parameters() if isinstance(value, MXWeight)]
    for name, value in weights:
        layout = replace(value.layout_, activation=None, rule=None)
        set_tensors(model, [(name, MXWeight(value.elements, value.scales, layout, value.dtype, value.multiplier))])
    return model


def tie_head(model: nn.Module, spec: Spec) -> nn.Module:
    """The model, changed: its embedding and its head share one MX weight, as the embedding of a lookup reads it."""
    head = mx_weight(model.lm_head.weight.detach(), spec)
    table = MXWeight(head.elements, head.scales, MXLayout(spec.weight, head.layout_.size), head.dtype)
    set_tensors(model, [("model.embed_tokens.weight", table), ("lm_head.weight", head)])
    return model


def _llama(specs: Mapping[str, Spec], format: str | None = None, **sizes: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (quantized(tiny_llama(**sizes), specs), format)


def _alike(*layers: str, spec: Spec) -> dict[str, Spec]:
    return dict.fromkeys((f"{layer}_proj" for layer in layers), spec)


QKV, UP = ("q", "k", "v"), ("gate", "up")
MIXED = {
    **_alike(*QKV, spec=Spec("mxfp8_e4m3", "mxfp8_e4m3")),
    **_alike(*UP, spec=Spec("mxfp4", "mxfp4")),
    "o_proj": Spec("mxfp4", "mxfp8_e4m3+aligned"),  # down_proj stays float
}
PREPARED = {
    **_alike(*QKV, spec=Spec(multiplier=1)),  # in both layers the same, stored once
    **_alike(*UP, spec=Spec(multiplier=2, rotation=64)),
    "o_proj": Spec(rotation=128),
    "down_proj": Spec(multiplier=3, run=32),
}
UNEQUAL = {**_alike("q", "k", spec=Spec()), "v_proj": Spec("mxint8")}
COMPRESSED = "compressed-tensors"
BIASES = {"attention_bias": True, "mlp_bias": True}

CHECKPOINTS: Final[dict[str, Callable[[], tuple[nn.Module, str | None]]]] = {
    "float": lambda: (tiny_llama(), "float"),
    "w4a8": _llama({"_proj": Spec()}),
    "w8a8": _llama({"_proj": Spec("mxint8")}),
    "w4a16": _llama({"_proj": Spec("mxfp4", None), "lm_head": Spec("mxfp8_e4m3", None)}, **BIASES),
    "mixed": _llama(MIXED, **BIASES),
    "prepared": _llama(PREPARED),
    "tied": lambda: (
        tie_head(quantized(tiny_llama(tie_word_embeddings=True), {"_proj": Spec("mxint8")}), Spec("mxint8")),
        None,
    ),
    "unequal": _llama(UNEQUAL),
    "stock mxfp4": _llama({"_proj": Spec("mxfp4", None)}, COMPRESSED),
    "stock mxfp8": _llama({"_proj": Spec("mxfp8_e4m3", "mxfp8_e4m3")}, COMPRESSED),
    "stock mixed": _llama({"down_proj": Spec("mxfp8_e4m3", None), "_proj": Spec("mxfp4", None)}, COMPRESSED),
}
"""Name -> the model and the format in which it is saved: None is our own, "float" a plain model of transformers."""
