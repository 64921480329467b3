"""Experts of a quantized transformers model: an implementation of our own, "mx", in transformers' experts interface.

    experts(hidden_states, chosen, weights) -> mx::experts(...)

It computes what transformers' implementations do, in one operator, if both weights are MX weights and the activation
between them is a known gate (`numerics/gates.py`); `set_experts_implementation` switches to another one, as always.
Where the operator does not apply, transformers' `grouped_mm` runs, whose matmuls decode chosen experts alone too.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.numerics.gates import recognize_gate
from mxcompile.tensor.experts import gated_experts
from mxcompile.tensor.modules import is_pretrained
from mxcompile.tensor.unfused import is_step_by_step, needs_gradient
from mxcompile.tensor.weight import MXWeight

IMPLEMENTATION: Final = "mx"
_GATE: Final = "mx_gate"


def register_experts() -> None:
    """Register the implementation with transformers; calling it again has no effect."""
    from transformers.integrations.moe import ExpertsInterface  # imports transformers

    ExpertsInterface.register(IMPLEMENTATION, experts_forward)


def use_mx_experts(model: nn.Module, *, keep_chosen: bool = False) -> None:
    """Let every transformers model in a quantized module run its experts with our implementation.

    keep_chosen: but not where another one than transformers' default is in force, as `from_pretrained` was told.
    """
    modules = [module for module in _experts_modules(model) if any(isinstance(w, MXWeight) for w in _weights(module))]
    if not modules:
        return
    register_experts()
    for module in modules:
        setattr(module, _GATE, _gate_of(module))
    for owner in _outermost_models(model):
        default = owner.get_correct_experts_implementation(None)
        if not keep_chosen or owner.get_experts_implementation()[""] == default:
            owner.set_experts_implementation(IMPLEMENTATION)


def use_default_experts(model: nn.Module) -> None:
    """Let a transformers model run its experts with transformers' own default again."""
    for module in _experts_modules(model):
        vars(module).pop(_GATE, None)
    for owner in _outermost_models(model):
        if IMPLEMENTATION in owner.get_experts_implementation().values():
            owner.set_experts_implementation(None)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module of transformers calls: hidden_states `[tokens, hidden]`, the others `[tokens, k]`."""
    if not _has_operator(module, hidden_states, top_k_weights):
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    up_bias, down_bias = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    weights = (module.gate_up_proj, up_bias, module.down_proj, down_bias)
    return gated_experts(hidden_states, top_k_index, top_k_weights, weights, getattr(module, _GATE))


def _has_operator(module: Any, x: Tensor, weights: Tensor) -> bool:
    """Whether `mx::experts`, which has no gradient, computes what the module does on x with these weights."""
    if getattr(module, _GATE, None) is None or is_step_by_step() or getattr(module, "has_post_expert_norm", False):
        return False
    up, down = module.gate_up_proj, module.down_proj
    packed = isinstance(up, MXWeight) and isinstance(down, MXWeight) and not down.is_prepared
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else ()
    return packed and x.dtype == up.dtype == down.dtype and not any(map(needs_gradient, (x, weights, *biases)))


def _experts_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that transformers' experts interface runs."""
    for module in model.modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            yield module


def _weights(module: nn.Module) -> list[Any]:
    return [getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]


def _gate_of(module: Any) -> str | None:
    """The text of the module's gate, None if it has none or none that is known."""
    weight = getattr(module, "gate_up_proj", None)
    if not module.has_gate or not isinstance(weight, MXWeight):
        return None
    width = weight.elements.shape[-2]
    numbers = tuple(value for value in vars(module).values() if isinstance(value, float))
    gate = recognize_gate(module._apply_gate, width, torch.device(weight.device), numbers)
    return None if gate is None else str(gate)


def _outermost_models(model: nn.Module) -> Iterator[Any]:
    """The transformers models that no other one holds."""
    if is_pretrained(model):
        yield model
        return
    for child in model.children():
        yield from _outermost_models(child)
