"""Agreement of the outputs of two models, in dB of SQNR."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.errors import InputError
from mxcompile.graph.dataflow import operand
from mxcompile.graph.inputs import map_leaves, named_leaves
from mxcompile.graph.program import Program, where
from mxcompile.numerics.metrics import sqnr_db


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Float tensors of a model's output by their path in it."""
    return {path: leaf for path, leaf in _tensors(output).items() if leaf.is_floating_point()}


def compared_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors that say whether two models agree: the float ones, or all where none is (token ids, masks).

    Integers beside floats say nothing more: an index of the largest of two nearly equal floats may change.
    """
    return output_tensors(output) or _tensors(output)


def output_leaves(output: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a model's output by their path in it, those of dataclasses too."""
    return named_leaves(map_leaves(_as_mapping, output))


def _tensors(output: Any) -> dict[str, Tensor]:
    return {path: leaf for path, leaf in output_leaves(output) if isinstance(leaf, Tensor)}


def _as_mapping(leaf: Any) -> Any:
    """The fields of a dataclass by name, nested ones too; anything else as it is."""
    if not is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    return {field.name: map_leaves(_as_mapping, getattr(leaf, field.name)) for field in fields(leaf)}


def agreement_db(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[float, str]:
    """(lowest SQNR over the outputs, the name of that output); -inf if one is missing or differs in shape or NaNs.

    Integers agree if they are equal.
    """
    each = ((_agreement(value, actual.get(name)), name) for name, value in expected.items())
    worst = min(each, default=(math.inf, ""))
    return worst[0], worst[1] or "0"


def _agreement(value: Tensor, other: Tensor | None) -> float:
    if other is None or value.shape != other.shape:
        return -math.inf
    if not value.is_floating_point():
        return math.inf if torch.equal(value, other.to(value.device)) else -math.inf
    if torch.isfinite(value).all() and torch.isfinite(other).all():
        return sqnr_db(value, other)
    finite = torch.isfinite(value)
    kinds = (tensor.masked_fill(finite, 0).nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0) for tensor in (value, other))
    if not torch.equal(*kinds) or not torch.isfinite(other[finite]).all():
        return -math.inf
    return sqnr_db(value[finite], other[finite])


def check_repeatable(program: Program, run: Callable[[], Any], required_db: float) -> None:
    """Raise InputError, which names the nodes that draw random numbers, if two runs differ by more than that in dB.

    For where an output differs from the expected one: the model may do that by itself.
    """
    agreement, name = agreement_db(compared_outputs(run()), compared_outputs(run()))
    if agreement >= required_db:
        return
    drawing = [where(node) for node in program.graph.nodes if _is_random(node)]
    listed = f": it draws random numbers at {', '.join(drawing[:4])}" if drawing else ""
    raise InputError(
        f"the model is not deterministic: two runs of it on the example inputs differ (output {name} agrees only to "
        f"{agreement:.1f} dB){listed}. Its quantized form cannot be compared with it: switch randomness off in eval "
        "mode, or pass the noise as an input"
    )


def _is_random(node: Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore
    switches = {"train": False, "training": False, "dropout_p": 0.0, "dropout": 0.0}
    return all(operand(node, names.index(name)) != off for name, off in switches.items() if name in names)
