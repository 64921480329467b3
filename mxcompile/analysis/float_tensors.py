"""The tensors that something other than a matmul reads: embeddings, position tables, masks that are added.

They stay float and say so, but they are no matmul weights: they do not count in the coverage.
"""

from collections.abc import Collection, Sequence

from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul, UnquantizedNode
from mxcompile.analysis.tensor_reads import EMBEDDING, read_tensors, tensor_sources
from mxcompile.graph.dataflow import target_name
from mxcompile.graph.program import Program, module_path


def find_float_tensors(
    program: Program, matmuls: Sequence[Matmul], unsupported: Sequence[UnquantizedNode], embeddings: Collection[Node]
) -> list[UnquantizedNode]:
    """The float tensors of two or more dimensions that nodes read outside of their matmuls, the largest first.

    One entry for each tensor, at its first reader. embeddings: lookups that will be quantized.
    """
    products = {matmul.node: matmul for matmul in matmuls}
    refused = {each.node for each in unsupported}
    claimed = {name for each in unsupported for name in each.weights} | {m.parameter for m in matmuls}
    sources = tensor_sources(program.graph, products.keys() | refused)
    readers: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node in sources or node in embeddings or node in refused:
            continue
        for tensor in read_tensors(node, sources):
            is_lookup = node.target is EMBEDDING and node.args[0] is tensor  # of a tied head too
            name = str(tensor.target)
            if tensor.meta["val"].dtype.is_floating_point and (is_lookup or name not in claimed):
                readers.setdefault(name, []).append(node)
    found = [
        UnquantizedNode.of(program, nodes[0], _reason(program, name, nodes), [name]) for name, nodes in readers.items()
    ]
    return sorted(found, key=lambda each: -each.bytes)


def _reason(program: Program, name: str, readers: Sequence[Node]) -> str:
    first = readers[0]
    if first.target is EMBEDDING and program.is_parameter(name):
        return f"an embedding stays float; ask for it with include={[module_path(first) or name]}"
    others = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
    return f"{name!r} is no weight of a matmul: {target_name(first)}{others} reads it, it stays float"
