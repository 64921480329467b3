"""Bind the arguments of one call to the placeholders of a graph."""

import copy
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program

NodeValues = dict[Node, Any]
"""Values of some nodes of a graph, for one batch."""


def bind_inputs(program: Program, batch: Inputs) -> NodeValues:
    """A batch as values of the graph's placeholders; raises InputError if its structure is not the traced one.

    The user's tensors are never written to: a graph with in-place ops gets copies.
    """
    program.example.check_call(batch)
    leaves = program.example.leaves_of(batch)
    bound = dict(zip(program.graph.find_nodes(op="placeholder"), leaves, strict=True))
    if not writes_in_place(program.graph.nodes):
        return bound
    copies = copy.deepcopy(list(bound.values()))  # in one call, so that views of one tensor still share storage
    return dict(zip(bound, copies, strict=True))


def writes_in_place(nodes: Iterable[Node]) -> bool:
    """Whether one of the nodes writes to a tensor that it reads."""
    return any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in nodes)
