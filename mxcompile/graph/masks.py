"""Which tokens of a batch its masks hide, and which inputs hold these tokens.

A mask is an input of one of these names, also with a prefix (`decoder_attention_mask`):

- `attention_mask`: `[batch, sequence]`, bool, int or float. 0 hides a token, any other number shows it (packed rows
  are numbered); a float mask with negative numbers is one to add to attention scores: they hide, 0 shows. Or `[batch,
  query, key]` and `[batch, heads, query, key]`: a bool or int mask as above, a float mask to add. A token is hidden if
  no query attends to it.
- `key_padding_mask` (`torch.nn.MultiheadAttention`): `[batch, sequence]`. True or a negative number hides a token.

A mask holds for inputs `[batch, sequence, ...]` of the same sizes: of several masks those with the prefix of an input's
name, else those without a prefix. A decoder's inputs (`decoder_`, `tgt`) belong to a mask with that prefix alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

_NAME = re.compile(r"(?P<prefix>(?:.*_)?)(?P<kind>attention_mask|key_padding_mask)(?:_.*)?")
_DECODER = ("decoder", "tgt")


@dataclass(frozen=True)
class TokenMask:
    """visible: `[batch, sequence]`, bool. sizes: of these two dimensions in the trace, an int or a symbol.

    prefix: of the mask's name.
    """

    prefix: str
    visible: Tensor
    sizes: tuple[Any, Any]

    def spread(self, dims: int) -> Tensor:
        """The mask of a value `[batch, sequence, ...]` of that many dimensions: size 1 along all others."""
        return self.visible.reshape(*self.visible.shape, *[1] * (dims - 2))

    def fits(self, traced: Tensor, value: Tensor) -> bool:
        """Whether an input is `[batch, sequence, ...]` of the mask's sizes; a mask of one row is that of all rows."""
        if value.dim() < 2 or self.visible.shape[1] != value.shape[1]:
            return False
        if self.visible.shape[0] != value.shape[0]:
            return self.visible.shape[0] == 1 and _may_be_equal(traced.shape[1], self.sizes[1])
        return all(map(_may_be_equal, traced.shape[:2], self.sizes))


def find_masks(values: Mapping[Node, Any]) -> list[TokenMask]:
    """The masks among the inputs of a batch that hide a token. values: of the graph's placeholders."""
    masks: list[TokenMask] = []
    for node, value in values.items():
        match = _NAME.fullmatch(str(node.target))
        traced = node.meta.get("val")
        if match and isinstance(value, Tensor) and isinstance(traced, Tensor) and value.dim() >= 2:
            visible = shown_tokens(value.detach(), match["kind"] == "attention_mask")
            if not visible.all():
                masks.append(TokenMask(match["prefix"].rstrip("_"), visible, (traced.shape[0], traced.shape[-1])))
    return masks


def shown_tokens(mask: Tensor, is_attention: bool = True) -> Tensor:
    """The tokens that a mask shows, bool `[batch, sequence]`. is_attention: False for a `key_padding_mask`."""
    if not is_attention:
        return mask >= 0 if mask.is_floating_point() else mask == 0
    if mask.dim() == 2:
        return mask >= 0 if mask.is_floating_point() and (mask < 0).any() else mask != 0
    attended = mask >= 0 if mask.is_floating_point() else mask != 0
    return attended.flatten(1, -2).any(1)


def masks_of(masks: Iterable[TokenMask], name: str, traced: Tensor, value: Tensor) -> list[TokenMask]:
    """The masks that hold for an input of that name: those with its prefix; else, but for a decoder's, the others."""
    fitting = [mask for mask in masks if mask.fits(traced, value)]
    own = [mask for mask in fitting if mask.prefix and name.startswith(mask.prefix)]
    if own or name.startswith(_DECODER):
        return own
    others = [mask for mask in fitting if not mask.prefix.startswith(_DECODER)]
    return [mask for mask in others if not mask.prefix] or others


def hides_everything(values: Mapping[Node, Any]) -> bool:
    """Whether a mask of a batch hides all of its tokens. values: of the graph's placeholders."""
    return any(not mask.visible.any() for mask in find_masks(values))


def _may_be_equal(size: Any, other: Any) -> bool:
    """Whether two traced sizes can be one: equal, or both of them symbols."""
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        return True
    return str(size) == str(other)
