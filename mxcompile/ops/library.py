"""The library of the `mx::` operators, and how one is defined: a schema, an implementation, and one on fake tensors."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from mxcompile.formats import MXFormat, ScaleRule, parse_format, parse_scale_rule
from mxcompile.kernels.layout.planes import PlanarScaling

LIBRARY = torch.library.Library("mx", "DEF")
format_of = cache(parse_format)
rule_of = cache(parse_scale_rule)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> None:
    """Define `mx::<schema>`, which runs the implementation on every device."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mx::{name}", fake, lib=LIBRARY)


def rounding_of(activation: str | None, rule: str | None) -> tuple[MXFormat, ScaleRule] | None:
    """Format and scale rule of an input, from their texts."""
    return None if activation is None or rule is None else (format_of(activation), rule_of(rule))


def scaling_of(planes: Sequence[int] | None) -> PlanarScaling | None:
    """The scaling of a planar weight, from an operator's argument."""
    return None if planes is None else PlanarScaling(*planes)
