"""Verify a Program after every pass: a valid graph, with all its tensors, and only ops that belong to its stage."""

from torch import Tensor
from torch.fx import Node

from mxcompile.errors import VerifyError
from mxcompile.formats import parse_format
from mxcompile.graph.dataflow import reads_graph
from mxcompile.graph.error_location import last_node
from mxcompile.graph.program import Program, Stage, where
from mxcompile.ops import DEQUANTIZE, LINEAR, QUANTIZE, QUANTIZE_DEQUANTIZE

_EXPLICIT = frozenset({QUANTIZE, DEQUANTIZE})
_FUSED = frozenset({QUANTIZE_DEQUANTIZE, LINEAR})


def check(program: Program) -> None:
    """Raise VerifyError if the graph is malformed, a tensor is missing, or an op does not belong to the stage."""
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        node = last_node(error)
        at = "" if node is None else f" at {where(node)}"
        raise VerifyError(f"the graph is malformed{at}: {str(error).splitlines()[0]}") from error
    for node in program.graph.nodes:
        if node.op == "get_attr" and not reads_graph(node):
            _check_tensor(program, node)
        if node.op == "call_function":
            _check_stage(program, node)
        if node.target is DEQUANTIZE:
            _check_dequantize(node)


def _check_stage(program: Program, node: Node) -> None:
    stage = program.stage
    if node.target in _EXPLICIT and stage < Stage.LOWERED and program.cache is None:  # a cache is rounded in any stage
        raise VerifyError(f"{where(node)} is {node.target}, but the program is not lowered: a pass sets its `gives`")
    if node.target in _FUSED and stage < Stage.FUSED:
        raise VerifyError(f"{where(node)} is {node.target}, but the program is not fused")
    if "val" not in node.meta:
        raise VerifyError(f"{where(node)} has no fake value: insert nodes with mxcompile.graph.edit.insert_call")


def _check_tensor(program: Program, node: Node) -> None:
    """A tensor is there, with the shape and dtype that its readers were traced with."""
    if not program.has_tensor(str(node.target)):
        raise VerifyError(f"{where(node)} reads {node.target!r}, which the program does not have")
    tensor, traced = program.stored(str(node.target)), node.meta.get("val")
    if isinstance(traced, Tensor) and (tensor.shape != traced.shape or tensor.dtype != traced.dtype):
        raise VerifyError(
            f"{where(node)} reads {node.target!r}, which is {tensor.dtype} {tuple(tensor.shape)} and was "
            f"{traced.dtype} {tuple(traced.shape)}: replace it by a tensor of the same shape and dtype"
        )


def _check_dequantize(node: Node) -> None:
    elements, scales, name, size = node.args[:4]
    fmt = parse_format(str(name))
    values = [n.meta["val"] for n in (elements, scales) if isinstance(n, Node)]
    if len(values) != 2 or not all(isinstance(v, Tensor) for v in values):
        raise VerifyError(f"{where(node)} does not read packed elements and scales")
    blocks = fmt.blocks(int(size)) if isinstance(size, int) else values[1].shape[-1]
    if values[1].shape[-1] != blocks or values[0].shape[-1] != blocks * fmt.block_bytes:
        raise VerifyError(f"{where(node)}: {tuple(values[0].shape)} bytes and {tuple(values[1].shape)} scales do not "
                          f"hold {size} values of {fmt}")  # fmt: skip
