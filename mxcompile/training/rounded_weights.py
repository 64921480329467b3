"""A linear whose forward rounds weight and input as that with an MXWeight does, while its weight stays float.

    linear(x, w) -> linear(round(rotate(x * m)), round(w))

The weight is rounded by a parametrization of `torch.nn.utils.parametrize`, the input by a forward pre-hook. Gradients
pass both roundings where no element saturates (`numerics/straight_through.py`).
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mxcompile.analysis.folds.multiplier import multiplier_digest
from mxcompile.errors import TrainingError, WeightError
from mxcompile.ops import MULTIPLY, QUANTIZE, QUANTIZE_DEQUANTIZE, ROTATE
from mxcompile.tensor.weight import MXLayout, MXWeight

_MULTIPLIER = "mx_multiplier"  # the name of a module's buffer


class RoundedWeight(nn.Module):
    """The parametrization: a float weight to the values that it has when deployed.

    layout: of the MXWeight that it becomes. rule: how the scales are chosen, each time anew. shift: what is added to
    the weight before, while adapters run (`rounded_adapters.py`).
    """

    def __init__(self, layout: MXLayout, rule: str) -> None:
        super().__init__()
        self.layout = layout
        self.rule = rule
        self.shift: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, in its own orientation."""
        weight = weight if self.shift is None else weight + self.shift
        values = QUANTIZE_DEQUANTIZE(self._rows(weight), self.layout.format, self.rule)
        values = values.transpose(-1, -2) if self.layout.transposed else values
        return values if torch.compiler.is_compiling() or type(values) is not Tensor else values.as_subclass(_Values)

    def pack(self, weight: Tensor, multiplier: Tensor | None) -> MXWeight:
        """The weight packed, with the same values as `forward` returns."""
        elements, scales = QUANTIZE(self._rows(weight), self.layout.format, self.rule)
        digest = None if multiplier is None else multiplier_digest(multiplier)
        return MXWeight(elements, scales, replace(self.layout, multiplier=digest), weight.dtype, multiplier)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).contiguous() if self.layout.transposed else weight


class _Values(Tensor):
    """Values that are computed each time: they cannot be set, as peft does to merge an adapter, which would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @property
    def data(self) -> Tensor:
        """The values, without a gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TrainingError(
            "the weight of a layer that rounds is computed from its float values, and what is written to it is lost: "
            "adapters of peft must be inside the rounding to be merged (mxcompile.round_adapters, before training)"
        )


@dataclass(frozen=True)
class RoundedInput:
    """The hook: a linear's input, prepared as that of a matmul with an MXWeight of this layout."""

    layout: MXLayout

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of forward with the prepared input as the first."""
        if args:
            return (self._prepared(module, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._prepared(module, kwargs[name])}

    def _prepared(self, module: nn.Module, x: Tensor) -> Tensor:
        multiplier = getattr(module, _MULTIPLIER, None)
        if multiplier is not None:
            x = MULTIPLY(x, multiplier, str(self.layout.multiplier))
        if self.layout.rotation is not None:
            x = ROTATE(x, self.layout.rotation)
        return x if self.layout.activation is None else QUANTIZE_DEQUANTIZE(x, self.layout.activation, self.layout.rule)


def prepares_input(weight: MXWeight) -> bool:
    """Whether the input of a matmul with the weight is multiplied, rotated or rounded."""
    return weight.is_prepared or weight.layout_.activation is not None


def attach(module: nn.Module, name: str, weight: MXWeight, rule: str) -> None:
    """Make a float parameter of a module, and that module's input, round as those of a matmul with `weight`.

    Raises TrainingError if the module has other parametrizations.
    """
    others: dict[str, Any] = getattr(module, "parametrizations", {})
    if not all(isinstance(step, RoundedWeight) for steps in others.values() for step in steps):
        raise TrainingError(
            f"a {type(module).__name__} has parametrizations of its own (torch.nn.utils.parametrize): remove them "
            "(remove_parametrizations) before the model is prepared"
        )
    parametrize.register_parametrization(module, name, RoundedWeight(weight.layout_, rule))
    if prepares_input(weight):
        if weight.multiplier is not None:
            module.register_buffer(_MULTIPLIER, weight.multiplier.detach().clone())
        module.register_forward_pre_hook(RoundedInput(weight.layout_), with_kwargs=True)


def rounded_weights(model: nn.Module) -> dict[str, tuple[nn.Module, str, RoundedWeight]]:
    """(owner, name in it, parametrization) of each weight that `attach` made round, by its full name."""
    found: dict[str, tuple[nn.Module, str, RoundedWeight]] = {}
    for path, module in model.named_modules():
        for name, steps in getattr(module, "parametrizations", {}).items():
            step = steps[0] if len(steps) else None
            if isinstance(step, RoundedWeight):
                found[f"{path}.{name}".lstrip(".")] = module, name, step
    return found


def packed(full_name: str, module: nn.Module, name: str, step: RoundedWeight) -> MXWeight:
    """The MXWeight of a weight that rounds. Raises WeightError if training has left NaN or Inf in it."""
    weight = latent(module, name)
    if type(weight).__name__ == "DTensor":
        raise TrainingError(
            f"{full_name!r} is sharded over processes: gather the state (get_model_state_dict with full_state_dict of "
            "torch.distributed.checkpoint.state_dict), load it into a model that prepare_training made from the same "
            "arguments, and finish that one"
        )
    if not weight.isfinite().all():
        raise WeightError(
            f"{full_name!r} holds NaN or Inf after training, as it does once a loss was NaN: go on from an earlier "
            "checkpoint with a smaller learning rate or clipped gradients (max_grad_norm)"
        )
    multiplier = multiplier_of(module)
    return step.pack(weight.detach(), None if multiplier is None else multiplier.detach().clone())


def multiplier_of(module: nn.Module) -> Tensor | None:
    """What the module's input is multiplied by, if anything."""
    return getattr(module, _MULTIPLIER, None)


def latent(module: nn.Module, name: str) -> Tensor:
    """The float values that are trained."""
    steps: Any = getattr(module, "parametrizations")[name]  # noqa: B009 - for pyright
    return steps.original


def detach(module: nn.Module) -> None:
    """Undo `attach`: the module has its parameters again, and its input is as it was.

    `parametrize.remove_parametrizations` would also change the class, which copies of the module share.
    """
    originals = {name: latent(module, name) for name in getattr(module, "parametrizations")}  # noqa: B009 - for pyright
    del module._modules["parametrizations"]  # pyright: ignore[reportPrivateUsage]
    module.__class__ = type(module).__bases__[0]
    for name, original in originals.items():
        module.register_parameter(name, cast(nn.Parameter, original))
    hooks = module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    for key in [key for key, hook in hooks.items() if isinstance(hook, RoundedInput)]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)  # pyright: ignore[reportPrivateUsage]
    if _MULTIPLIER in module._buffers:  # pyright: ignore[reportPrivateUsage]
        delattr(module, _MULTIPLIER)
