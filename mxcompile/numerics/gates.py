"""The gated activation between the two matmuls of an expert: f(gate) * up, as a value that kernels can be built for.

    gate, up = halves of the channels          (interleaved: even and odd channels)
    gate, up = min(gate, limit), clamp(up, -limit, limit)                     (with a limit)
    result   = f(gate) * (up + shift),   f = swish: gate * sigmoid(alpha * gate), gelu, or relu

SwiGLU (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202) is `Gate()`. gpt-oss has
`Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from typing import Final, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError

Function = Literal["swish", "gelu", "gelu_tanh", "relu"]
_PROBES: Final = 1024
_LARGEST_PROBE: Final = 24.0
_RELATIVE_ERROR: Final = 1e-5


@dataclass(frozen=True)
class Gate:
    """See the module's docstring. The text form, `str(gate)`, is read by `parse_gate`."""

    function: Function = "swish"
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0
    interleaved: bool = False

    def __str__(self) -> str:
        named = [(each.name, getattr(self, each.name), each.default) for each in fields(self)[1:]]
        options = [f"{name}={value}" for name, value, default in named if value != default]
        return ":".join((self.function, *options))

    def __call__(self, x: Tensor) -> Tensor:
        """Channels `[..., 2 * inner]` to `[..., inner]`, in the dtype of x, rounded after each step as torch does."""
        gate, up = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        up = up + self.shift if self.shift else up
        return self._activated(gate) * up

    def _activated(self, gate: Tensor) -> Tensor:
        if self.function == "swish":
            return F.silu(gate) if self.alpha == 1.0 else gate * torch.sigmoid(gate * self.alpha)
        if self.function == "relu":
            return F.relu(gate)
        return F.gelu(gate, approximate="tanh" if self.function == "gelu_tanh" else "none")


@cache
def parse_gate(text: str) -> Gate:
    """The gate of a text form, such as "swish" or "swish:alpha=1.702:limit=7.0:interleaved=True".

    Raises MXCompileError for a text that `str(gate)` does not make.
    """
    function, *options = text.split(":")
    pairs = {name: value for name, _, value in (option.partition("=") for option in options)}
    if function not in get_args(Function) or not set(pairs) <= {"alpha", "limit", "shift", "interleaved"}:
        raise MXCompileError(f"{text!r} is no gate: write {Gate()}, or {Gate(alpha=1.702, limit=7.0, shift=1.0)}")
    interleaved = pairs.pop("interleaved", "False") == "True"
    numbers = {name: float(value) for name, value in pairs.items()}
    return Gate(function, interleaved=interleaved, **numbers)  # pyright: ignore[reportArgumentType]


def recognize_gate(
    function: Callable[[Tensor], Tensor], width: int, device: torch.device, numbers: tuple[float, ...] = ()
) -> Gate | None:
    """The gate that computes the same as a function of channels `[rows, width]`, None if it is none of those known.

    Found by what it computes on values from -24 to 24, in float32. numbers: to be tried as alpha and limit too.
    """
    rows = -(-_PROBES // width) + 1
    order = torch.randperm(rows * width, generator=torch.Generator().manual_seed(0))
    probe = torch.linspace(-_LARGEST_PROBE, _LARGEST_PROBE, rows * width)[order].view(rows, width).to(device)
    with torch.no_grad():
        expected = function(probe)
        for gate in _candidates(numbers):
            actual = gate(probe)
            if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=_RELATIVE_ERROR, atol=1e-6):
                return gate
    return None


def _candidates(numbers: tuple[float, ...]) -> Iterator[Gate]:
    limits = (None, *(number for number in numbers if number > 0))
    for interleaved, limit, shift in product((False, True), dict.fromkeys(limits), (0.0, 1.0)):
        for alpha in dict.fromkeys((1.0, *numbers)):
            yield Gate("swish", alpha, limit, shift, interleaved)
        for function in ("gelu", "gelu_tanh", "relu"):
            yield Gate(function, 1.0, limit, shift, interleaved)
