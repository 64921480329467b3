"""merge_adapters: a quantized model with LoRA adapters of peft -> the quantized model alone.

    y = linear(x, w) + linear(linear(x, a), b) * s   ->   y = linear(x, round(w + s b a))

The sum is rounded again in the weight's own format, by the scales of least squared error. What that loses of the
adapter is measured on batches. To lose nothing, keep the adapter beside the model: peft saves and loads it.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.errors import InputError, TrainingError, WeightError, warn
from mxcompile.formats import ScaleRule
from mxcompile.graph.agreement import output_tensors
from mxcompile.graph.inputs import Inputs, as_batches
from mxcompile.numerics.hadamard import rotate_weight
from mxcompile.numerics.metrics import kl_divergence
from mxcompile.ops import QUANTIZE
from mxcompile.tensor.modules import eval_mode
from mxcompile.tensor.weight import MXWeight


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
def merge_adapters(model: nn.Module, batches: object = None) -> MergedAdapters:
    """Merge the active LoRA adapters of a quantized model into its packed weights.

    model: what `peft.get_peft_model(quantized, LoraConfig(...))` returned, or `PeftModel.from_pretrained`. It is used
    up, as by peft's own `merge_and_unload`: go on with the `model` of the result.
    batches: inputs, in the form of calibration data, on which the KL divergence of the logits is measured. Warns if the
    merged model is as far from the one with adapters as that without them: then the rounding has undone them.

    Layers that stay float are merged by peft. Raises TrainingError for a model without adapters, and for adapters that
    no weight can hold (DoRA, biases of LoRA); WeightError for NaN or Inf. The model is then as it was.
    """
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if _is_lora(layer)}
    if not layers or not hasattr(model, "unload"):
        raise TrainingError(
            f"this {type(model).__name__} has no LoRA adapters: give merge_adapters what peft.get_peft_model returned"
        )
    merged = {name: _merged(name, layer) for name, layer in layers.items() if isinstance(_weight(layer), MXWeight)}
    kl = None if batches is None else _divergences(model, layers, merged, list(as_batches(batches)))
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


def _is_lora(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer")


def _weight(layer: Any) -> Any:
    return getattr(layer.get_base_layer(), "weight", None)


def _merged(name: str, layer: Any) -> nn.Parameter:
    """The packed weight of a layer with the products of its active adapters, rounded again."""
    weight: MXWeight = _weight(layer).to_row_major()
    spec = weight.layout_
    rows = weight.dequantize().float()
    rows = rows.transpose(-1, -2) if spec.transposed else rows
    for adapter in _active(layer):
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            kind = "a variant of LoRA such as DoRA" if adapter in layer.lora_variant else "a bias of LoRA"
            raise TrainingError(
                f"{name} has {kind} in its adapter {adapter!r}, which no packed weight can hold: keep the adapter "
                "beside the model, or call dequantize() of the transformers model and merge with peft"
            )
        delta = layer.get_delta_weight(adapter).detach().float()
        rows = rows + _for_prepared_input(weight, delta.transpose(-1, -2) if spec.transposed else delta)
    if not rows.isfinite().all():
        raise WeightError(
            f"the adapters of {name} hold NaN or Inf, as they do once a loss was NaN: go on from an earlier checkpoint "
            "with a smaller learning rate or clipped gradients (max_grad_norm)"
        )
    elements, scales = QUANTIZE(rows.to(weight.dtype).contiguous(), spec.format, str(ScaleRule.MSE))
    value = MXWeight(elements, scales, spec, weight.dtype, weight.multiplier)
    return nn.Parameter(value, requires_grad=False)


def _active(layer: Any) -> list[str]:
    if layer.merged_adapters:
        raise TrainingError(f"adapters {layer.merged_adapters} are merged already: unmerge them before (unmerge())")
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _for_prepared_input(weight: MXWeight, delta: Tensor) -> Tensor:
    """A product `[out, in]` for the plain input, as one for the input that the weight multiplies and rotates."""
    if weight.multiplier is not None:
        multiplier = weight.multiplier.float()
        delta = torch.where(multiplier == 0, 0.0, delta / multiplier)
    return delta if weight.layout_.rotation is None else rotate_weight(delta, weight.layout_.rotation)


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
