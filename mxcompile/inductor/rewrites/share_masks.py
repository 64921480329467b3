"""attention(q, k, v, visible), in each layer -> attention(q, k, v, bias), bias = where(visible, 0, -inf), once.

torch converts a mask of booleans in each call of attention. In a graph as a whole these are one; where layers are
compiled apart, it would be a kernel in each of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

_HIDDEN = float("-inf")


def share_masks(graph: Graph) -> int:
    """Convert each mask of a Dynamo graph where it is read first, in place. Returns the number of rewritten calls."""
    shared: dict[tuple[Node, torch.dtype], Node] = {}
    count = 0
    for call in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        mask, query = call.kwargs.get("attn_mask"), _value(call.args[0]) if call.args else None
        if not isinstance(mask, Node) or query is None or (visible := _value(mask)) is None:
            continue
        if visible.dtype == torch.bool:
            if (mask, query.dtype) not in shared:
                with graph.inserting_before(call):
                    shared[mask, query.dtype] = _converted(graph, mask, visible, query.dtype)
            call.update_kwarg("attn_mask", shared[mask, query.dtype])
            count += 1
    return count


def _converted(graph: Graph, mask: Node, visible: Tensor, dtype: torch.dtype) -> Node:
    hidden, zeros = graph.call_function(torch.logical_not, (mask,)), graph.call_function(torch.zeros_like, (mask,))
    zeros.kwargs = {"dtype": dtype}
    bias = graph.call_method("masked_fill", (zeros, hidden, _HIDDEN))
    hidden.meta["example_value"] = torch.logical_not(visible)
    zeros.meta["example_value"] = torch.zeros_like(visible, dtype=dtype)
    bias.meta["example_value"] = zeros.meta["example_value"].masked_fill(hidden.meta["example_value"], _HIDDEN)
    return bias


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None
