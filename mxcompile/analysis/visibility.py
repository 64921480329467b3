"""Which rows of every value stand for tokens that a mask shows, found by carrying the mask along the data flow.

    input [batch, sequence] -> mask        linear, norm, x + y, view, x[index] ... -> the mask of its rows

Observers, searches, training and measures count visible rows alone: what stands behind a mask is filler, and where most
of a batch is padding it would be most of the statistics. The mask goes where the tokens go: ops that move rows (view,
transpose, cat, x[index] of a router) are applied to the mask itself, at run time; other ops keep the rows whose
dimension keeps its size. `masks.py` says which inputs are masks.

A row of a value that is no token counts as long as one visible token goes into it: a pooled sample unless all of it is
hidden, a convolution's frame unless all that it covers is hidden, a query of an attention matrix as its token does. A
value that depends on no hidden token (positions, images, a decoder without a mask) counts whole.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from mxcompile.analysis.row_masks import SELECTS, Mask, compact, mask_after, op_name
from mxcompile.graph.agreement import output_leaves
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.masks import TokenMask, find_masks, masks_of
from mxcompile.graph.program import Program


class Visibility:
    """The visible rows of one batch's values.

    values: of the graph's placeholders. weight: how much each visible row counts, where batches count differently.
    `record` must be called with every computed node in graph order, once its value is known; the others read what it
    has found. Where nothing is hidden it costs nothing, and every value counts whole.
    """

    def __init__(self, values: Mapping[Node, Any], weight: float = 1.0) -> None:
        self.weight = weight
        self._masks: dict[Node, Mask] = {}
        self._selected: set[Node] = set()
        self._covered: list[tuple[TokenMask, Any, Any]] = []
        masks = find_masks(values)
        for node, value in values.items() if masks else ():
            traced = node.meta.get("val")
            if isinstance(value, Tensor) and isinstance(traced, Tensor):
                self._cover(node, traced, value, masks)

    @property
    def hides(self) -> bool:
        """Whether anything is hidden."""
        return bool(self._masks)

    def record(self, node: Node, values: Mapping[Node, Any]) -> None:
        """Find the visible rows of a node's value. values: of the node and of all that it reads."""
        if not self._masks or node.op != "call_function" or (node in self._masks and node not in self._selected):
            return
        masks = {source: mask for source in node.all_input_nodes if (mask := self._masks.get(source)) is not None}
        if not masks:
            return
        if node.target is operator.getitem:
            (mask,) = masks.values()
            mask = mask[cast(int, node.args[1])] if isinstance(mask, tuple) else mask
        else:
            mask = mask_after(node, masks, values)
        if isinstance(mask, Tensor):
            mask = self._restored(node, compact(mask), values[node])
            mask = next((m for m in masks.values() if isinstance(m, Tensor) and _same(m, mask)), mask)
        self._masks[node] = mask
        if op_name(node) in SELECTS or any(source in self._selected for source in masks):
            self._selected.add(node)  # by indices that another run may compute differently

    def mask(self, node: Node, value: Tensor) -> Tensor | None:
        """The visible rows of a value `[..., size]`, bool `[rows]`; None if all are."""
        mask = self._masks.get(node)
        if not isinstance(mask, Tensor):
            return None
        mask = mask.any(-1).expand(value.shape[:-1]) if value.dim() else mask
        mask = mask.reshape(-1).to(value.device)
        return None if mask.all() else mask

    def rows(self, node: Node, value: Tensor) -> Tensor:
        """The visible rows `[tokens, size]` of a value `[..., size]`; the value itself if all are visible."""
        mask = self.mask(node, value)
        return value if mask is None else value.reshape(len(mask), -1)[mask]

    def elements(self, node: Node, value: Tensor) -> Tensor:
        """The visible elements of a value, bool, of its shape."""
        mask = self._masks.get(node)
        visible = mask if isinstance(mask, Tensor) else torch.ones((), dtype=torch.bool)
        return visible.to(value.device).expand(value.shape)

    def _cover(self, node: Node, traced: Tensor, value: Tensor, masks: Iterable[TokenMask]) -> None:
        for token_mask in masks_of(masks, str(node.target), traced, value):
            mask, previous = token_mask.spread(value.dim()), self._masks.get(node)
            self._masks[node] = mask & previous if isinstance(previous, Tensor) else mask
            self._covered.append((token_mask, traced.shape[0], traced.shape[1]))

    def _restored(self, node: Node, mask: Tensor, value: Tensor) -> Tensor:
        """The mask, and along a sequence that ops before it have lost, again that of the tokens.

        A padding to whole windows loses the sequence, as its size changes; once it is cut back, its traced size is the
        symbol of the sequence again.
        """
        traced = node.meta.get("val")
        names = list(map(str, traced.shape)) if isinstance(traced, Tensor) else []
        for token_mask, batch, sequence in self._covered:
            if not isinstance(batch, torch.SymInt) or not isinstance(sequence, torch.SymInt):
                continue
            tokens, joined = token_mask.visible, str(batch * sequence)
            if joined in names:
                dims = (names.index(joined),)
                tokens = tokens.expand(value.shape[dims[0]] // tokens.shape[1], -1).flatten()
            elif names[:1] == [str(batch)] and str(sequence) in names[1:]:
                dims = (0, names.index(str(sequence), 1))
            else:
                continue
            if mask.shape[dims[-1]] == 1:
                shape = [tokens.shape[dims.index(dim)] if dim in dims else 1 for dim in range(value.dim())]
                return mask & tokens.to(mask.device).reshape(shape)
        return mask


def output_paths(program: Program) -> list[str]:
    """The path of every output of the graph in the model's output (`logits`, `0`), in the order of the graph's."""
    (end,) = program.graph.find_nodes(op="output")
    places = program.graph.process_outputs(tuple(range(len(cast(tuple[Any, ...], end.args[0])))))
    paths = {place: path for path, place in output_leaves(places) if isinstance(place, int)}
    return [paths[index] for index in sorted(paths)]


def output_masks(program: Program, inputs: Inputs) -> dict[str, Tensor]:
    """The visible rows of a program's outputs by path, bool `[rows]`, on one batch.

    Without the outputs that count whole: nothing of them is hidden, or everything.
    """
    values = bind_inputs(program, inputs)
    visibility = Visibility(values)
    if not visibility.hides:
        return {}
    (end,) = program.graph.find_nodes(op="output")
    with torch.no_grad(), program.state_kept():
        outputs = _Recorder(program, visibility).run(initial_env=values, enable_io_processing=False)
    leaves = zip(output_paths(program), cast(tuple[Any, ...], end.args[0]), outputs, strict=True)
    masks = {p: visibility.mask(n, v) for p, n, v in leaves if isinstance(n, Node) and isinstance(v, Tensor)}
    return {path: mask for path, mask in masks.items() if mask is not None and mask.any()}


def without_hidden(outputs: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by path, those with a mask as their visible rows `[tokens, size]`."""
    return {
        path: value.reshape(len(masks[path]), -1)[masks[path]] if _fits(masks.get(path), value) else value
        for path, value in outputs.items()
    }


class _Recorder(Interpreter):
    def __init__(self, program: Program, visibility: Visibility) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False
        self.visibility = visibility

    def run_node(self, n: Node) -> Any:
        self.env[n] = super().run_node(n)
        self.visibility.record(n, self.env)
        return self.env[n]


def _fits(mask: Tensor | None, value: Tensor) -> bool:
    return mask is not None and len(mask) == (value[..., 0].numel() if value.dim() else 1)


def _same(mask: Tensor, other: Tensor) -> bool:
    return mask.shape == other.shape and torch.equal(mask, other)
