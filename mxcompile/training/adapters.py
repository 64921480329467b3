"""merge_adapters: a quantized model with LoRA adapters of peft -> the quantized model alone.

    y = linear(x, w) + linear(linear(x, a), b) * s   ->   y = linear(x, round(w + s b a))

The sum is rounded again in the weight's own format, to nearest by the scales of least squared error, or by GPTQ on
batches: then later columns make up for what earlier ones have lost of the adapter. What is lost in the end is measured
on batches. To lose nothing, keep the adapter beside the model: peft saves and loads it.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.errors import InputError, TrainingError, WeightError, warn
from mxcompile.formats import ScaleRule, parse_format
from mxcompile.graph.agreement import output_tensors
from mxcompile.graph.inputs import Inputs, as_batches
from mxcompile.numerics.column_rounding import ColumnOrder, ColumnRounding
from mxcompile.numerics.exact_packing import pack_exactly
from mxcompile.numerics.hadamard import rotate_weight
from mxcompile.numerics.metrics import kl_divergence
from mxcompile.numerics.reference import largest_exponent
from mxcompile.ops import MULTIPLY, QUANTIZE
from mxcompile.tensor.modules import eval_mode
from mxcompile.tensor.weight import MXWeight

_DAMPING = 0.01  # of GPTQ, as in the pass


@dataclass(frozen=True)
class MergedAdapters:
    """What `merge_adapters` returns.

    model: the quantized model, without adapters. merged: names of the layers whose weights have changed.
    kl_before: mean KL(with adapters || without), in nats a token: what the adapters do. kl_after: mean KL(with adapters
    || merged): what of that the rounding has lost. Both None without batches.
    """

    model: Any
    merged: tuple[str, ...]
    kl_before: float | None = None
    kl_after: float | None = None

    def __str__(self) -> str:
        layers = f"{len(self.merged)} layers merged and rounded again"
        if self.kl_before is None or self.kl_after is None:
            return f"{layers}; give batches to measure what that loses"
        return (
            f"{layers}; KL from the model with adapters: {self.kl_before:.3g} nats a token without them, "
            f"{self.kl_after:.3g} merged"
        )


@checked
def merge_adapters(model: nn.Module, batches: object = None, *, gptq: bool = False) -> MergedAdapters:
    """Merge the active LoRA adapters of a quantized model into its packed weights.

    model: what `peft.get_peft_model(quantized, LoraConfig(...))` returned, or `PeftModel.from_pretrained`. It is used
    up, as by peft's own `merge_and_unload`: go on with the `model` of the result.
    batches: inputs, in the form of calibration data, on which the KL divergence of the logits is measured. Warns if the
    merged model is as far from the one with adapters as that without them: then the rounding has undone them.
    gptq: round by GPTQ on the batches; in 4 bits that keeps more of the adapters than rounding to nearest.

    Layers that stay float are merged by peft. Raises TrainingError for a model without adapters, and for adapters that
    no weight can hold (DoRA, biases of LoRA); WeightError for NaN or Inf. The model is then as it was.
    """
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if is_lora(layer)}
    if not layers or not hasattr(model, "unload"):
        raise TrainingError(
            f"this {type(model).__name__} has no LoRA adapters: give merge_adapters what peft.get_peft_model returned"
        )
    inputs = [] if batches is None else list(as_batches(batches))
    packed = {name: layer for name, layer in layers.items() if isinstance(_weight(layer), MXWeight)}
    sums = {name: _sum(name, layer) for name, layer in packed.items()}
    moments = _moments(model, packed, inputs) if gptq else {}
    merged = {name: _rounded(_weight(packed[name]), rows, moments.get(name)) for name, rows in sums.items()}
    kl = None if batches is None else _divergences(model, layers, merged, inputs)
    for name, layer in layers.items():
        if name in merged:
            layer.get_base_layer().weight = merged[name]
        else:
            layer.merge()
    names = tuple(name.removeprefix("base_model.model.") for name in merged)
    result = MergedAdapters(cast(Any, model).unload(), names, *(kl or ()))
    if kl is not None and kl[1] >= kl[0]:
        warn(
            f"{result}: rounding has undone the adapters. Keep them beside the quantized model (save_pretrained of "
            "peft), train longer, or merge them into the float model and quantize that"
        )
    return result


def is_lora(layer: nn.Module) -> bool:
    """Whether a module is a layer with LoRA adapters of peft."""
    return hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer")


def _weight(layer: Any) -> Any:
    return getattr(layer.get_base_layer(), "weight", None)


def _sum(name: str, layer: Any) -> Tensor:
    """The weight of a layer with the products of its active adapters, float32 `[out, in]`."""
    weight: MXWeight = _weight(layer).to_row_major()
    spec = weight.layout_
    rows = weight.dequantize().float()
    rows = rows.transpose(-1, -2) if spec.transposed else rows
    for adapter in active_adapters(layer):
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            kind = "a variant of LoRA such as DoRA" if adapter in layer.lora_variant else "a bias of LoRA"
            raise TrainingError(
                f"{name} has {kind} in its adapter {adapter!r}, which no packed weight can hold: keep the adapter "
                "beside the model, or call dequantize() of the transformers model and merge with peft"
            )
        delta = layer.get_delta_weight(adapter).detach().float()
        delta = delta.transpose(-1, -2) if spec.transposed else delta
        rows = rows + for_prepared_input(delta, weight.multiplier, spec.rotation)
    if not rows.isfinite().all():
        raise WeightError(
            f"the adapters of {name} hold NaN or Inf, as they do once a loss was NaN: go on from an earlier checkpoint "
            "with a smaller learning rate or clipped gradients (max_grad_norm)"
        )
    return rows


def _rounded(packed: MXWeight, rows: Tensor, moments: SecondMoments | None) -> nn.Parameter:
    """Rows `[out, in]` rounded in the format of a packed weight; moments: of its input, for GPTQ."""
    weight = packed.to_row_major()
    spec = weight.layout_
    if moments is None:
        elements, scales = QUANTIZE(rows.to(weight.dtype).contiguous(), spec.format, str(ScaleRule.MSE))
    else:
        fmt = parse_format(spec.format)
        rounding = ColumnRounding(fmt, _DAMPING, ColumnOrder.BLOCKS, None, 0, 0, largest_exponent(weight.dtype))
        values, scales = rounding.round(rows, moments.inputs)
        elements = pack_exactly(values.to(weight.dtype), scales, fmt)
    value = MXWeight(elements, scales, spec, weight.dtype, weight.multiplier)
    return nn.Parameter(value, requires_grad=False)


def _moments(model: nn.Module, layers: Mapping[str, Any], batches: list[Inputs]) -> dict[str, SecondMoments]:
    """Second moments of the layers' inputs, rounded as at run time, in the model with adapters."""
    if not batches:
        raise InputError("gptq=True rounds by what the layers' inputs are: give batches")
    moments = {name: SecondMoments(_weight(each).layout_.size, _weight(each).device) for name, each in layers.items()}

    def update(name: str, layer: Any, args: tuple[Any, ...]) -> None:
        moments[name].update(_weight(layer).prepare(args[0].to(_weight(layer).dtype)).flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(partial(update, name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in batches:
                model(*batch.args, **batch.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def active_adapters(layer: Any) -> list[str]:
    """The adapters of a layer that are in use. Raises TrainingError if some are merged."""
    if layer.merged_adapters:
        raise TrainingError(f"adapters {layer.merged_adapters} are merged already: unmerge them before (unmerge())")
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def for_prepared_input(delta: Tensor, multiplier: Tensor | None, rotation: int | None) -> Tensor:
    """A product `[out, in]` for the plain input, as one for the input that is multiplied and rotated."""
    if multiplier is not None and multiplier.dim() == 1:
        delta = delta / torch.where(multiplier == 0, torch.inf, multiplier.to(delta.dtype))
    elif multiplier is not None:
        inverse = torch.linalg.inv(multiplier.double()).transpose(-1, -2)
        delta = MULTIPLY(delta, inverse.to(delta.dtype).contiguous(), "inverse")
    return delta if rotation is None else rotate_weight(delta, rotation)


def _divergences(
    model: Any, layers: Mapping[str, Any], merged: Mapping[str, nn.Parameter], batches: list[Inputs]
) -> tuple[float, float]:
    """Mean KL from the model with adapters to that without, and to the merged one."""
    before = after = tokens = 0.0
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            exact = _logits(model, batch, nullcontext())
            count = exact[..., 0].numel() * batch.weight
            before += kl_divergence(exact, _logits(model, batch, model.disable_adapter())) * count
            after += kl_divergence(exact, _logits(model, batch, _in_place(layers, merged))) * count
            tokens += count
    if not tokens:
        raise InputError("batches is empty: give at least one batch, or leave it out to merge without measuring")
    return before / tokens, after / tokens


def _logits(model: nn.Module, batch: Inputs, state: Any) -> Tensor:
    with state:
        outputs = output_tensors(model(*batch.args, **batch.kwargs))
    if not outputs:
        raise InputError(f"no output of {type(model).__name__} is a float tensor: leave batches out")
    return outputs.get("logits", next(iter(outputs.values())))


@contextmanager
def _in_place(layers: Mapping[str, Any], merged: Mapping[str, nn.Parameter]) -> Generator[None]:
    """In which the packed weights hold the adapters, which do nothing beside them."""
    packed = {name: _weight(layers[name]) for name in merged}
    scaling = {name: dict(layers[name].scaling) for name in merged}
    try:
        for name, value in merged.items():
            layers[name].get_base_layer().weight = value
            layers[name].scaling.update(dict.fromkeys(scaling[name], 0.0))
        yield
    finally:
        for name, value in packed.items():
            layers[name].get_base_layer().weight = value
            layers[name].scaling.update(scaling[name])
