"""The norms of transformer layers as values: what a fused kernel must know of one.

    n = (x - mean(x)) / sqrt(var(x) + eps)     LayerNorm, `centered`
    n = x / sqrt(mean(x**2) + eps)             RMSNorm
    y = n * (weight + offset) + bias

All in float32; the result is rounded once to the dtype of x. Where `narrowed`, n is rounded to it, too, before the
multiplication (Llama); `offset` is 1 where weights are stored as differences from 1 (Gemma).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError


@dataclass(frozen=True)
class Norm:
    """A norm of rows. Its text, as `parse_norm` reads it: `rms{eps=1e-06,narrowed}`."""

    eps: float
    centered: bool = False
    narrowed: bool = False
    offset: float = 0.0

    def __str__(self) -> str:
        options = [f"eps={self.eps!r}"]
        options += ["narrowed"] if self.narrowed else []
        options += [f"offset={self.offset!r}"] if self.offset else []
        return f"{'layer' if self.centered else 'rms'}{{{','.join(options)}}}"

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x `[..., size]`, weight and bias `[size]`; the result in the shape and dtype of x."""
        wide = x.float()
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        n = n.to(x.dtype).float() if self.narrowed else n
        n = n if weight is None else n * (weight.float() + self.offset)
        return (n if bias is None else n + bias.float()).to(x.dtype)


def parse_norm(text: str) -> Norm:
    """The norm with that text. Raises MXCompileError if there is none."""
    kind, _, rest = text.removesuffix("}").partition("{")
    options = {name: value for name, _, value in (part.partition("=") for part in rest.split(","))}
    if kind not in ("rms", "layer") or "eps" not in options or not options.keys() <= {"eps", "narrowed", "offset"}:
        raise MXCompileError(f"{text!r} is no norm; one is 'rms{{eps=1e-06,narrowed}}'")
    return Norm(float(options["eps"]), kind == "layer", "narrowed" in options, float(options.get("offset", 0.0)))
