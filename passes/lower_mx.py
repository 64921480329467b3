"""matmul(x, w) -> matmul(dequantize(quantize(x)), dequantize(w_elements, w_scales)).

Every chosen weight is packed; its matmul's input gets an explicit `mx::quantize` / `mx::dequantize` pair, one pair per
value, shared by all matmuls that read it. Without `activation` the inputs stay float (weight-only). An embedding that
was asked for by name looks up packed rows. The lowered graph runs in eager as the reference on any device.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile import packing, reference
from mxcompile.analysis.choice import Choice, check_coverage, choose, refuse_inseparable
from mxcompile.analysis.matmuls import Matmul, finite_rows, read_instead
from mxcompile.edit import BLOCK_AXIS, insert_call, insert_tensor
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat, ScaleRule, activation_rule
from mxcompile.importance import round_rows
from mxcompile.ledger import PassResult
from mxcompile.ops import DEQUANTIZE, QUANTIZE
from mxcompile.pipeline import FLOATING, Pass
from mxcompile.program import Program, Rounding, Stage
from mxcompile.rows import row_wise

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerMX(Pass):
    """Formats of weights and activations (`activation=None`: weight-only).

    weight_rule: scales of weights that no earlier pass has rounded (`mse` counts errors by the importance of input
    channels, where a pass has measured it). activation_rule: scales of activations, computed at
    run time; None takes the format's default (`formats.activation_rule`).
    """

    weight: MXFormat
    activation: MXFormat | None = None
    weight_rule: ScaleRule = ScaleRule.MSE
    activation_rule: ScaleRule | None = None

    name = "lower-mx"
    accepts = FLOATING | {Stage.LOWERED}
    gives = Stage.LOWERED

    def run(self, program: Program) -> PassResult:
        """Lower every chosen matmul and the embeddings that were asked for."""
        choice = refuse_inseparable(program, choose(program))
        check_coverage(program, choice)
        weights: dict[str, Node] = {}
        inputs: dict[Node, Node] = {}
        todo = [matmul for matmul in choice.matmuls if not matmul.is_lowered]
        for matmul in todo:
            if matmul.parameter not in weights:
                weights[matmul.parameter] = self._lower_weight(program, matmul)
            matmul.reader.replace_input_with(matmul.root, weights[matmul.parameter])
            if not matmul.root.users:
                program.forget(matmul.root)
            if self.activation is not None:
                if matmul.activation not in inputs:
                    inputs[matmul.activation] = self._lower_input(program, matmul, self.activation)
                read_instead(matmul.node, inputs[matmul.activation])
        embeddings = self._lower_embeddings(program, choice)
        program.graph.eliminate_dead_code()
        program.drop_unread()
        return PassResult(len(todo) + embeddings, choice.misses)

    def _lower_weight(self, program: Program, matmul: Matmul) -> Node:
        """The weight's `mx::dequantize`, in the parameter's own orientation, in front of its first reader."""
        rows = finite_rows(program, matmul)
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        before = min(matmul.root.users, key=order.__getitem__)
        elements, scales = self._pack(program, matmul.parameter, rows, before)
        name = f"{matmul.root.name}_dequantized"
        args = (elements, scales, str(self.weight), rows.shape[-1], rows.dtype)
        weight = insert_call(program, before, DEQUANTIZE, args, name)
        weight.meta[BLOCK_AXIS] = matmul.axis
        if matmul.axis == -1:
            return weight
        return insert_call(program, before, aten.transpose.int, (weight, -1, -2), f"{name}_t")

    def _lower_input(self, program: Program, matmul: Matmul, fmt: MXFormat) -> Node:
        """The dequantized activation, in front of the first matmul that reads it."""
        x, before = matmul.activation, matmul.node
        rule = self.activation_rule or activation_rule(fmt)
        quantized = insert_call(program, before, QUANTIZE, (x, str(fmt), str(rule)), f"{x.name}_quantized")
        elements = insert_call(program, before, operator.getitem, (quantized, 0), f"{x.name}_elements")
        scales = insert_call(program, before, operator.getitem, (quantized, 1), f"{x.name}_scales")
        args = (elements, scales, str(fmt), matmul.in_features, x.meta["val"].dtype)
        return insert_call(program, before, DEQUANTIZE, args, f"{x.name}_dequantized")

    def _lower_embeddings(self, program: Program, choice: Choice) -> int:
        """embedding(w, ids) -> dequantize(embedding(w_elements, ids), embedding(w_scales, ids))."""
        for node in choice.embeddings:
            weight = node.args[0]
            assert isinstance(weight, Node)
            rows = program.tensor(str(weight.target)).detach()
            packed = self._pack(program, str(weight.target), rows, node)
            looked_up = [insert_call(program, node, aten.embedding.default, (p, node.args[1]), p.name) for p in packed]
            args = (*looked_up, str(self.weight), rows.shape[-1], rows.dtype)
            node.replace_all_uses_with(insert_call(program, node, DEQUANTIZE, args, f"{node.name}_dequantized"))
        return len(choice.embeddings)

    def _pack(self, program: Program, name: str, rows: Tensor, before: Node) -> tuple[Node, Node]:
        """Nodes that read the packed elements and scales of a weight `[..., out, in]`, packed at the first call."""
        if not program.has_tensor(f"{name}_elements"):
            elements, scales = self._quantize(program, name, rows)
            program.set_tensor(f"{name}_elements", elements)
            program.set_tensor(f"{name}_scales", scales)
        elements = insert_tensor(program, before, f"{name}_elements")
        return elements, insert_tensor(program, before, f"{name}_scales")

    def _quantize(self, program: Program, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Elements and scales; for a weight that is already rounded, the ones it was rounded to."""
        rounded = program.rounded.pop(name, None)
        if rounded is None:
            rows, scales = round_rows(rows, self.weight, self.weight_rule, program.importance.get(name))
            rounded = Rounding(self.weight, scales)
        if rounded.format != self.weight:
            raise PassError(
                f"{name!r} was rounded to {rounded.format}, lower-mx has weight={self.weight}: use one format"
            )
        elements, again = row_wise(self._encode_rows, rows, rounded.scales)
        if not torch.equal(again, rows):
            raise PassError(f"{name!r} does not hold {self.weight} values any more: a pass changed it after rounding")
        return elements, rounded.scales

    def _encode_rows(self, rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        codes = reference.quantize_on_scales(rows, scales, self.weight)
        again = reference.dequantize(codes, scales, self.weight, rows.shape[-1], rows.dtype)
        return packing.pack(codes, self.weight), again
