"""Keys or values <-> packed MX elements and scales, as a cache holds them."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, activation_rule
from mxcompile.numerics.cache_format import CacheFormat, head_rotation
from mxcompile.numerics.exact_tokens import ExactTokens, put_exact
from mxcompile.ops.exact_tokens import factor_of

_MX = torch.ops.mx


@dataclass(frozen=True)
class Coding:
    """How keys, or values, of a cache are stored. format: None for floats. rotates: heads are rotated first."""

    format: MXFormat | None
    rotates: bool = False

    @classmethod
    def of(cls, form: CacheFormat) -> tuple[Self, Self]:
        """That of keys, and that of values."""
        return cls(form.key, form.rotate), cls(form.value)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Floats `[..., size]` to elements and scales; of no format, the floats themselves and no scales."""
        if self.format is None:
            return states, states.new_empty((*states.shape[:-1], 0), dtype=torch.uint8)
        if self.rotates:
            states = _MX.rotate(states, head_rotation(states.shape[-1]))
        return _MX.quantize(states, str(self.format), str(activation_rule(self.format)))

    def decode(self, elements: Tensor, scales: Tensor, like: Tensor) -> Tensor:
        """The inverse of `encode` up to rounding, a new tensor. like: has the size and dtype of the floats."""
        if self.format is None:
            return elements.clone()
        size = like.shape[-1]
        states = _MX.dequantize(elements, scales, str(self.format), size, like.dtype)
        if not self.rotates:
            return states
        block = head_rotation(size)
        return _MX.rotate(states, block) * factor_of(block)

    def read(
        self, elements: Tensor, scales: Tensor, exact: ExactTokens, held: Tensor, position: Tensor, window: int
    ) -> Tensor:
        """`decode`, with what the token at `position` reads exactly; see `numerics/exact_tokens.py`."""
        if self.format is None:
            return put_exact(elements.clone(), exact, held, position, window, window > 0)
        block = head_rotation(exact.own.shape[-1]) if self.rotates else 1
        rest = (exact.own, exact.newest, exact.first, held, position)
        return _MX.read_cache(elements, scales, *rest, str(self.format), block, window)

    def empty(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Elements and scales of no tokens. like: `[..., tokens, size]`."""
        shape = (*like.shape[:-2], 0)
        if self.format is None:
            return like.new_empty((*shape, like.shape[-1])), like.new_empty((*shape, 0), dtype=torch.uint8)
        blocks = self.format.blocks(like.shape[-1])
        widths = (blocks * self.format.block_bytes, blocks)
        elements, scales = (like.new_empty((*shape, width), dtype=torch.uint8) for width in widths)
        return elements, scales
