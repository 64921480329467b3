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
from typing import Final, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError

Function = Literal["swish", "gelu", "gelu_tanh", "relu"]
_PROBES: Final = 257
_LARGEST_PROBE: Final = 24.0
_ALPHAS: Final = (1.0, 1.702)
_LIMITS: Final = (None, 7.0, 10.0, 12.0)
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
    pairs = dict(option.partition("=")[::2] for option in options)
    if function not in get_args(Function) or not set(pairs) <= {"alpha", "limit", "shift", "interleaved"}:
        raise MXCompileError(f"{text!r} is no gate: write {Gate()}, or {Gate(alpha=1.702, limit=7.0, shift=1.0)}")
    interleaved = pairs.pop("interleaved", "False") == "True"
    numbers = {name: float(value) for name, value in pairs.items()}
    return Gate(function, interleaved=interleaved, **numbers)  # pyright: ignore[reportArgumentType]


def recognize_gate(function: Callable[[Tensor], Tensor], limits: tuple[float, ...] = ()) -> Gate | None:
    """The gate that computes the same as a function of channels `[rows, 2 * inner]`, None if it is none of those known.

    Found by what it computes, on values from -24 to 24 in float32, on the CPU. limits: numbers to be tried as limits.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(-_LARGEST_PROBE, _LARGEST_PROBE, _PROBES)
    order = torch.randperm(_PROBES, generator=generator)
    other = torch.randperm(_PROBES, generator=generator)
    probe = torch.stack([spread[order], spread[other]], dim=-1)  # [probes, 2]: two channels for one inner one
    wide = torch.cat([probe, probe.flip(0)], dim=-1)  # two inner channels tell halves from pairs
    with torch.no_grad():
        expected = function(wide)
        for gate in _candidates(limits):
            actual = gate(wide)
            if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=_RELATIVE_ERROR, atol=1e-6):
                return gate
    return None


def _candidates(limits: tuple[float, ...]) -> Iterator[Gate]:
    for interleaved in (False, True):
        for limit in dict.fromkeys((*_LIMITS, *limits)):
            for shift in (0.0, 1.0):
                for alpha in _ALPHAS:
                    yield Gate("swish", alpha, limit, shift, interleaved)
                for function in ("gelu", "gelu_tanh", "relu"):
                    yield Gate(function, 1.0, limit, shift, interleaved)
