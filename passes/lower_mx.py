"""matmul(x, w) -> matmul(dequantize(quantize(x)), dequantize(w_elements, w_scales)).

Every chosen weight is packed. The input of its matmul gets an `mx::quantize` / `mx::dequantize` pair, shared by all
matmuls that read the same value in the same format. Without `activation`, inputs stay float (weight-only). An embedding
that was included by name looks up packed rows. In eager mode, the lowered graph runs the reference implementation.
"""

import hashlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import MatmulChoice, check_coverage, choose, exclude_shared_weights, override_formats
from mxcompile.analysis.matmuls import Matmul, finite_rows, replace_activation
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.quantizers import input_format
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat, ScaleRule, activation_rule
from mxcompile.graph.edit import BLOCK_AXIS, PACKS, insert_call, insert_tensor
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Rounding, Stage
from mxcompile.graph.records import PassResult
from mxcompile.numerics.exact_packing import InexactError, pack_exactly
from mxcompile.numerics.importance import round_rows
from mxcompile.ops import DEQUANTIZE, QUANTIZE
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.tensor.weight import MXWeight

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerMX(Pass):
    """Formats of weights and activations (`activation=None`: weight-only).

    weight_rule: scale rule of weights that no earlier pass has rounded (`mse` weights errors by the importance of input
    channels if a pass has measured it). activation_rule: scale rule of activations at run time; None: the format's
    default (`formats.activation_rule`).
    activation=mxfp8_e4m3+aligned makes activations E4M3 numbers times one power of two per token, which drops low bits
    of values far below the token's largest (`reference.align`). With 4-bit weights, matmuls of many tokens then run on
    the FP8 tensor cores of Hopper GPUs; the result is the same on every device.
    overrides: other weight formats by name pattern, None for a layer that stays float (`name_patterns.py`).
    """

    weight: MXFormat
    activation: MXFormat | None = None
    weight_rule: ScaleRule = ScaleRule.MSE
    activation_rule: ScaleRule | None = None
    overrides: Mapping[str, MXFormat | None] = Overrides()

    name = "lower-mx"
    accepts = FLOATING | {Stage.LOWERED}
    gives = Stage.LOWERED

    @property
    def reads_calibration(self) -> bool:
        """False: weights are rounded without calibration data, activations at run time."""
        return False

    def run(self, program: Program) -> PassResult:
        """Lower every chosen matmul and every included embedding."""
        choice, formats = override_formats(program, choose(program), self.weight, self.overrides)
        choice = exclude_shared_weights(program, choice)
        _check_rounded_weights_are_lowered(program, choice)
        check_coverage(program, choice)
        weights: dict[str, Node] = {}
        inputs: dict[tuple[Node, MXFormat], Node] = {}
        todo = [matmul for matmul in choice.matmuls if not matmul.is_lowered]
        for matmul in program.track(todo):
            if matmul.parameter not in weights:
                weights[matmul.parameter] = self._lower_weight(program, matmul, formats[matmul.node])
            if matmul.root.users:  # else lowered with another of several weights that one node takes from a parameter
                matmul.reader.replace_input_with(matmul.root, weights[matmul.parameter])
                if not matmul.root.users:
                    program.erase_tensor_node(matmul.root)
            fmt = input_format(program, matmul, self.activation)
            if fmt is not None:
                key = matmul.activation, fmt
                if key not in inputs:
                    inputs[key] = self._lower_input(program, matmul, fmt)
                replace_activation(matmul.node, inputs[key])
        embeddings = self._lower_embeddings(program, choice, formats)
        program.graph.eliminate_dead_code()
        program.drop_unread()
        return PassResult(len(todo) + embeddings, choice.misses)

    def _lower_weight(self, program: Program, matmul: Matmul, fmt: MXFormat) -> Node:
        """Insert the weight's `mx::dequantize`, in the parameter's own orientation, before its first reader."""
        float_weight = program.stored(matmul.parameter)
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        before = min(matmul.root.users, key=order.__getitem__)
        read = partial(finite_rows, program, matmul)
        elements, scales = self._pack(program, matmul.parameter, read, before, fmt)
        name = f"{matmul.root.name}_dequantized"
        args = (elements, scales, str(fmt), matmul.in_features, float_weight.dtype)
        weight = insert_call(program, before, DEQUANTIZE, args, name)
        weight.meta[BLOCK_AXIS] = matmul.axis
        if matmul.axis == -1:
            return weight
        return insert_call(program, before, aten.transpose.int, (weight, -1, -2), f"{name}_t")

    def _lower_input(self, program: Program, matmul: Matmul, fmt: MXFormat) -> Node:
        """Insert the dequantized activation before the first matmul that reads it."""
        x, before = matmul.activation, matmul.node
        rule = (self.activation_rule if fmt == self.activation else None) or activation_rule(fmt)
        quantized = insert_call(program, before, QUANTIZE, (x, str(fmt), str(rule)), f"{x.name}_quantized")
        elements = insert_call(program, before, operator.getitem, (quantized, 0), f"{x.name}_elements")
        scales = insert_call(program, before, operator.getitem, (quantized, 1), f"{x.name}_scales")
        args = (elements, scales, str(fmt), matmul.in_features, x.meta["val"].dtype)
        return insert_call(program, before, DEQUANTIZE, args, f"{x.name}_dequantized")

    def _lower_embeddings(self, program: Program, choice: MatmulChoice, formats: Mapping[Node, MXFormat]) -> int:
        """embedding(w, ids) -> dequantize(embedding(w_elements, ids), embedding(w_scales, ids))."""
        for node in choice.embeddings:
            weight = node.args[0]
            assert isinstance(weight, Node)
            rows = program.tensor(str(weight.target)).detach()
            packed = self._pack(program, str(weight.target), lambda rows=rows: rows, node, formats[node])
            looked_up = [insert_call(program, node, aten.embedding.default, (p, node.args[1]), p.name) for p in packed]
            args = (*looked_up, str(formats[node]), rows.shape[-1], rows.dtype)
            node.replace_all_uses_with(insert_call(program, node, DEQUANTIZE, args, f"{node.name}_dequantized"))
        return len(choice.embeddings)

    def _pack(
        self, program: Program, name: str, read: Callable[[], Tensor], before: Node, fmt: MXFormat
    ) -> tuple[Node, Node]:
        """Nodes that read the packed elements and scales of a weight, which the first call packs.

        read: returns the weight `[..., out, in]`.
        """
        names = _packed_names(program, name)
        if not program.has_tensor(names[0]):
            for part, values in zip(names, self._quantize(program, name, read, fmt), strict=True):
                program.set_tensor(part, values)
        elements, scales = (insert_tensor(program, before, part) for part in names)
        elements.meta[PACKS] = scales.meta[PACKS] = name
        return elements, scales

    def _quantize(
        self, program: Program, name: str, read: Callable[[], Tensor], fmt: MXFormat
    ) -> tuple[Tensor, Tensor]:
        """Elements and scales; of a weight that an earlier pass rounded, those of that rounding."""
        rounded, stored = program.rounded.pop(name, None), program.stored(name)
        if rounded is None:
            return self._rounded(program, name, read, fmt)
        if rounded.format != fmt:
            raise PassError(
                f"{name!r} was rounded to {rounded.format}, but lower-mx has weight={fmt} for it: use one format, and "
                "the same overrides in both passes"
            )
        if isinstance(stored, MXWeight):
            return stored.elements, stored.scales
        scales = program.in_use(rounded.scales)  # where the weight is
        return _packed_exactly(name, read(), Rounding(fmt, scales)), rounded.scales

    def _rounded(self, program: Program, name: str, read: Callable[[], Tensor], fmt: MXFormat) -> tuple[Tensor, Tensor]:
        """Round a weight now, unless an interrupted run has."""
        part = f"weight-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        saved = load_part(program, part)
        if saved is not None:
            device = program.device(name)
            return saved[0]["elements"].to(device), saved[0]["scales"].to(device)
        importance, rule = program.importance.get(name), self.weight_rule
        rows, scales = ranks_of(program).by_rows(lambda part: round_rows(part, fmt, rule, importance), read())
        elements = _packed_exactly(name, rows, Rounding(fmt, scales))
        save_part(program, part, {"elements": elements, "scales": scales})
        return elements, scales


def _packed_exactly(name: str, rows: Tensor, rounding: Rounding) -> Tensor:
    try:
        return pack_exactly(rows, rounding.scales, rounding.format)
    except InexactError as error:
        reason = f"{name!r} no longer holds {rounding.format} values: a pass changed it after rounding"
        raise PassError(reason) from error


def _packed_names(program: Program, name: str) -> tuple[str, str]:
    """Names of a weight's elements and scales: those that it has, else ones that no other tensor has."""
    names = (f"{name}_elements", f"{name}_scales")
    nodes = [node for node in program.graph.find_nodes(op="get_attr") if node.meta.get(PACKS) == name]
    if nodes:
        stem = str(nodes[0].target).removesuffix("_elements").removesuffix("_scales")
        return f"{stem}_elements", f"{stem}_scales"
    while any(map(program.has_tensor, names)):
        name = f"{name}_"
        names = (f"{name}_elements", f"{name}_scales")
    return names


def _check_rounded_weights_are_lowered(program: Program, choice: MatmulChoice) -> None:
    """Raise PassError if a weight was rounded but would stay float."""
    staying_float = {refusal.node for refusal in choice.skipped}
    for matmul in choose(program).matmuls:
        if matmul.node in staying_float and matmul.parameter in program.rounded:
            raise PassError(
                f"{matmul.parameter!r} was rounded to {program.rounded[matmul.parameter].format}, but an override of "
                "lower-mx keeps it in float: use the same overrides in the pass that rounded it"
            )
