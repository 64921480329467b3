"""round_adapters: LoRA adapters of peft on a prepared model -> adapters inside the rounding of their weights (L4Q).

    linear(q(x), round(w)) + linear(linear(x, a), b) * s   ->   linear(q(x), round(w + s b a))

Beside the rounding, an adapter would be lost in part once it is merged. Inside it, the merged model is the trained one
to the bit: what trains is the rounded sum. L4Q (Jeon et al., arXiv 2402.04902).
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.errors import TrainingError
from mxcompile.training.adapters import active_adapters, for_prepared_input, is_lora
from mxcompile.training.rounded_weights import RoundedWeight, latent, multiplier_of

M = TypeVar("M", bound=nn.Module)
_NAME = "weight"


@checked
def round_adapters(model: M) -> M:
    """Put the LoRA adapters of a prepared model inside the rounding of the weights that they adapt.

    model: `peft.get_peft_model(prepared, LoraConfig(...))` or `PeftModel.from_pretrained(prepared, ...)`, where
    `prepared` is what `prepare_training` returned. It is changed, and returned. Trainers and peft go on working with
    it: adapters are saved and loaded in peft's format, and `finish_training(model.merge_and_unload())` deploys the
    model, with the outputs that it had in training.

    Layers that do not round keep their adapters beside the weight. Raises TrainingError, which names the layer, for
    adapters that no weight can hold (DoRA, dropout, biases of LoRA), and for a model without any that rounds.
    """
    adapted: dict[str, Any] = {n: layer for n, layer in model.named_modules() if is_lora(layer)}
    layers = {n: layer for n, layer in adapted.items() if rounding_of(layer) is not None}
    if not layers:
        raise TrainingError(
            f"this {type(model).__name__} has no LoRA adapter on a weight that rounds: give round_adapters what "
            "peft.get_peft_model returned for a model of prepare_training"
        )
    for name, layer in layers.items():
        for adapter in layer.lora_A:
            _check(name, layer, adapter)
    for layer in layers.values():
        if not is_inside(layer):
            layer.__class__ = _inside(type(layer))
    return model


def rounding_of(layer: Any) -> RoundedWeight | None:
    """How the weight of an adapted layer rounds, None if it does not."""
    steps = getattr(layer.get_base_layer(), "parametrizations", {})
    step = steps[_NAME][0] if _NAME in steps else None
    return step if isinstance(step, RoundedWeight) else None


def is_inside(layer: nn.Module) -> bool:
    """Whether an adapted layer's adapters are inside its rounding."""
    return getattr(layer, "adapters_inside_rounding", False)


def _check(name: str, layer: Any, adapter: str) -> None:
    reasons = {
        "a variant of LoRA such as DoRA": adapter in layer.lora_variant,
        "a bias of LoRA": layer.lora_bias.get(adapter),
        "dropout (lora_dropout), which acts on the input alone": not isinstance(
            layer.lora_dropout[adapter], nn.Identity
        ),
    }
    for what, found in reasons.items():
        if found:
            raise TrainingError(f"{name} has {what} in its adapter {adapter!r}, which no rounded weight can hold")


def _sum_of(layer: Any, adapters: Sequence[str]) -> Tensor | None:
    """What adapters add to the float weight, in its orientation and for its prepared input; None without any."""
    step = rounding_of(layer)
    deltas = [layer.get_delta_weight(adapter) for adapter in adapters]
    if step is None or not deltas:
        return None
    delta, multiplier = torch.stack(deltas).sum(0), multiplier_of(layer.get_base_layer())
    if multiplier is not None or step.layout.rotation is not None:
        rows = delta.transpose(-1, -2) if step.layout.transposed else delta
        rows = for_prepared_input(rows, multiplier, step.layout.rotation)
        delta = rows.transpose(-1, -2) if step.layout.transposed else rows
    return delta.to(latent(layer.get_base_layer(), _NAME).dtype)


@contextmanager
def _shifted(step: RoundedWeight, shift: Tensor | None) -> Generator[None]:
    step.shift = shift
    try:
        yield
    finally:
        step.shift = None


@cache
def _inside(kind: type[Any]) -> type[Any]:
    """The class of an adapted layer whose adapters are inside the rounding, from peft's."""

    class Inside(kind):
        adapters_inside_rounding = True

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The base layer's output, its weight that with the active adapters."""
            if kwargs.pop("adapter_names", None) is not None:
                raise TrainingError("a batch with an adapter for each row cannot run inside the rounding of one weight")
            step, names = rounding_of(self), () if self.disable_adapters or self.merged else active_adapters(self)
            assert step is not None
            with _shifted(step, _sum_of(self, names)):
                return self.base_layer(x, *args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add adapters to the float weight, which rounds to the same values as before."""
            from peft.tuners.tuners_utils import check_adapters_to_merge

            del safe_merge
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            self._add(names, 1)
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            """Take the merged adapters out of the float weight again, up to the rounding of its sums."""
            self._add(self.merged_adapters, -1)
            self.merged_adapters.clear()

        @torch.no_grad()
        def _add(self, names: Sequence[str], sign: int) -> None:
            delta = _sum_of(self, names)
            if delta is not None:
                latent(self.get_base_layer(), _NAME).add_(delta, alpha=sign)

    Inside.__name__ = Inside.__qualname__ = f"Rounded{kind.__name__}"
    return Inside
