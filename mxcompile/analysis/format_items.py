"""Format items: matmuls whose weights get one format together, where a pass chooses formats.

Joined are the readers of one value (q, k and v; gate and up), which kernels and vLLM run in one launch if they have one
format; all uses of one weight; and the experts of one module.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import networkx
from torch.fx import Node

from mxcompile.analysis.choice import MatmulChoice, choose, exclude_shared_weights, override_formats, pattern_names
from mxcompile.analysis.matmuls import Matmul
from mxcompile.formats import MXFormat
from mxcompile.graph.name_patterns import last_match
from mxcompile.graph.program import Program


@dataclass(frozen=True)
class FormatItem:
    """Matmuls whose weights get one format, in graph order."""

    matmuls: tuple[Matmul, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights, each once."""
        return tuple(dict.fromkeys(matmul.parameter for matmul in self.matmuls))

    @property
    def values(self) -> int:
        """The number of values in all weights."""
        return sum(matmul.root.meta["val"].numel() for matmul in self.by_weight.values())

    def stored_bytes(self, fmt: MXFormat | None) -> int:
        """Bytes of all weights in a file, with their scales; None: in float."""
        sizes = ((m.root.meta["val"], m.in_features) for m in self.by_weight.values())
        if fmt is None:
            return sum(weight.numel() * weight.element_size() for weight, _ in sizes)
        return sum(fmt.storage_bytes(math.prod(weight.shape) // size, size) for weight, size in sizes)

    @property
    def by_weight(self) -> dict[str, Matmul]:
        """For each weight its first matmul."""
        return {matmul.parameter: matmul for matmul in self.matmuls}


@dataclass(frozen=True)
class FormatItems:
    """The items of a program. free: their format is to be chosen.

    fixed: an override, or an earlier pass, has given them the format (None: float). choice: the matmuls of all items.
    """

    free: tuple[FormatItem, ...]
    fixed: tuple[tuple[FormatItem, MXFormat | None], ...]
    choice: MatmulChoice

    @property
    def values(self) -> int:
        """The number of values in all weights, without those that are fixed to float."""
        return sum(item.values for item in (*self.free, *(item for item, fmt in self.fixed if fmt is not None)))

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the weights that are fixed, without those in float."""
        return sum(item.stored_bytes(fmt) for item, fmt in self.fixed if fmt is not None)


def find_items(
    program: Program, default: MXFormat, overrides: Mapping[str, MXFormat | None], *, joined: bool = True
) -> FormatItems:
    """The items of all matmuls to quantize, without those whose weight something else reads in float.

    default: any format. joined: whether the readers of one value are one item. Raises UnknownNameError for an override
    that matches nothing, and PipelineError if one weight would get two formats.
    """
    choice = exclude_shared_weights(program, choose(program))
    _, formats = override_formats(program, choice, default, overrides)
    fixed: dict[Matmul, MXFormat | None] = {}
    for matmul in choice.matmuls:
        is_named = last_match(overrides, pattern_names(program, matmul)) is not None
        if is_named or matmul.parameter in program.formats:
            fixed[matmul] = formats.get(matmul.node)
    free = tuple(matmul for matmul in choice.matmuls if matmul not in fixed)
    by_weight: dict[str, list[Matmul]] = {}
    for matmul in fixed:
        by_weight.setdefault(matmul.parameter, []).append(matmul)
    alone = ((FormatItem(tuple(readers)), fixed[readers[0]]) for readers in by_weight.values())
    return FormatItems(_joined(free, by_value=joined), tuple(alone), choice)


def _joined(matmuls: tuple[Matmul, ...], *, by_value: bool) -> tuple[FormatItem, ...]:
    """Matmuls that share a weight or a module of experts, joined, and those that share a value if `by_value`."""
    links = networkx.Graph()
    position = {matmul: index for index, matmul in enumerate(matmuls)}
    for matmul in matmuls:
        links.add_edge(matmul, ("weight", matmul.parameter))
        if matmul.root.meta["val"].dim() != 2:
            links.add_edge(matmul, ("module", matmul.parameter.rpartition(".")[0]))
        elif by_value:
            links.add_edge(matmul, ("value", matmul.activation))
    groups = (
        sorted((each for each in group if isinstance(each, Matmul)), key=position.__getitem__)
        for group in networkx.connected_components(links)
    )
    return tuple(FormatItem(tuple(group)) for group in sorted(groups, key=lambda group: position[group[0]]))


def inputs_of(item: FormatItem) -> tuple[Node, ...]:
    """The values that an item's matmuls multiply, each once."""
    return tuple(dict.fromkeys(matmul.activation for matmul in item.matmuls))
