"""Parameters that hold all experts of a layer <-> one tensor for each projection.

    gate_up_proj [experts, 2 * inner, hidden]  <->  gate_proj, up_proj [experts, inner, hidden]
    gate_up_proj [experts, hidden, 2 * inner]  <->  the same, of gpt-oss and Llama-4
    gate_up_proj_bias [experts, 2 * inner]     <->  gate_proj, up_proj biases [experts, inner]

The rows of gate and up lie one after the other, or take turns (gpt-oss). transformers states both on the module that
has the parameters (`is_transposed`, `is_concatenated`); of a module that states nothing, nothing is assumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

_PROJECTIONS: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
MIXTRAL_NAMES: Final = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""How Mixtral was published, and how other programs call the projections of GraniteMoE too."""
_UNMARKED: Final = {"Llama4TextExperts": (True, False)}
"""(transposed, interleaved) of classes of transformers that do not state it."""


@dataclass(frozen=True)
class FusedTensor:
    """A parameter that holds one or two projections of all experts, or their biases.

    path: of its module. projections: in the order of their rows. leaf: "weight" or "bias". transposed: the parameter is
    `[experts, in, out]`. interleaved: rows of the projections take turns.
    """

    path: str
    projections: tuple[str, ...]
    leaf: str
    transposed: bool
    interleaved: bool

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Views of the parameter's projections: weights as `[experts, out, in]`, biases as `[experts, out]`."""
        if isinstance(value, MXWeight):
            layout = replace(value.layout_, transposed=False)
            rows = self._rows(value.elements.shape[1])
            return {
                projection: MXWeight(value.elements[:, own], value.scales[:, own], layout, value.dtype)
                for projection, own in rows.items()
            }
        oriented = value.transpose(-1, -2) if self.transposed and self.leaf == "weight" else value
        return {projection: oriented[:, own] for projection, own in self._rows(oriented.shape[1]).items()}

    def join(self, source: str, parts: Mapping[str, Sequence[Tensor]], shape: torch.Size) -> Tensor:
        """The parameter, of that shape, from a tensor `[out, in]` (a bias: `[out]`) for each expert of each projection.

        Raises CheckpointError, beginning with `source`, if they do not fit together.
        """
        first = parts[self.projections[0]][0]
        is_weight = self.leaf == "weight"
        out, *width = (shape[2], shape[1]) if self.transposed and is_weight else shape[1:]
        rows = self._rows(out)
        for projection, own in rows.items():
            expected = (len(range(out)[own]), *width)
            if len(parts[projection]) != shape[0]:
                raise CheckpointError(f"{source} needs {shape[0]} experts, there are {len(parts[projection])}")
            for number, part in enumerate(parts[projection]):
                _check(f"{source}: {projection} of expert {number}", part, first, expected)
        if not isinstance(first, MXWeight):
            joined = self._filled(parts, rows, (shape[0], out))
            return joined.transpose(-1, -2).contiguous() if self.transposed and is_weight else joined
        weights = {p: [part for part in parts[p] if isinstance(part, MXWeight)] for p in rows}
        elements = self._filled({p: [w.elements for w in weights[p]] for p in rows}, rows, (shape[0], out))
        scales = self._filled({p: [w.scales for w in weights[p]] for p in rows}, rows, (shape[0], out))
        return MXWeight(elements, scales, replace(first.layout_, transposed=self.transposed), first.dtype)

    def _rows(self, out: int) -> dict[str, slice]:
        """Where the rows of each projection are among the `out` rows of an expert."""
        count = len(self.projections)
        if self.interleaved:
            return {projection: slice(n, None, count) for n, projection in enumerate(self.projections)}
        size = out // count
        return {projection: slice(n * size, (n + 1) * size) for n, projection in enumerate(self.projections)}

    def _filled(
        self, parts: Mapping[str, Sequence[Tensor]], rows: Mapping[str, slice], shape: tuple[int, int]
    ) -> Tensor:
        first = parts[self.projections[0]][0]
        joined = torch.empty((*shape, *first.shape[1:]), dtype=first.dtype)
        for projection, own in rows.items():
            for number, part in enumerate(parts[projection]):
                joined[number, own] = part
        return joined


def fused_tensors(module: nn.Module) -> dict[str, FusedTensor]:
    """The parameters of a module that hold all experts of a layer, by name."""
    return dict(_find(module))


def expert_of(value: Tensor, number: int) -> Tensor:
    """A view of one expert of a tensor or MX weight `[experts, ...]`."""
    if not isinstance(value, MXWeight):
        return value[number]
    return MXWeight(value.elements[number], value.scales[number], value.layout_, value.dtype)


def unstack(value: Tensor) -> list[Tensor]:
    """Such a view for each expert."""
    return [expert_of(value, number) for number in range(value.shape[0])]


def _find(module: nn.Module) -> Iterator[tuple[str, FusedTensor]]:
    for path, owner in module.named_modules():
        order = _order(owner)
        if order is None:
            continue
        for stem, projections in _PROJECTIONS.items():
            name = f"{path}.{stem}" if path else stem
            weight, bias = (getattr(owner, own, None) for own in (stem, f"{stem}_bias"))
            interleaved = order[1] and len(projections) > 1
            if isinstance(weight, Tensor) and weight.dim() == 3:
                yield name, FusedTensor(path, projections, "weight", order[0], interleaved)
                if isinstance(bias, Tensor):
                    yield f"{name}_bias", FusedTensor(path, projections, "bias", order[0], interleaved)


def _order(owner: Any) -> tuple[bool, bool] | None:
    """(transposed, interleaved) of a module with experts; None if it does not state it."""
    transposed, concatenated = getattr(owner, "is_transposed", None), getattr(owner, "is_concatenated", None)
    if isinstance(transposed, bool) and isinstance(concatenated, bool):
        return transposed, not concatenated
    return next((_UNMARKED[kind.__name__] for kind in type(owner).__mro__ if kind.__name__ in _UNMARKED), None)


def _check(what: str, part: Tensor, first: Tensor, expected: tuple[int, ...]) -> None:
    if type(part) is not type(first) or part.dtype != first.dtype or tuple(part.shape) != expected:
        raise CheckpointError(
            f"{what} is {list(part.shape)} ({part.dtype}, {type(part).__name__}), which does not fit the others that "
            f"belong there: {list(expected)} ({first.dtype}, {type(first).__name__})"
        )
    if isinstance(part, MXWeight) and isinstance(first, MXWeight) and part.layout_ != first.layout_:
        raise CheckpointError(f"{what} is in {part.layout_.format}, others that belong there are not")
