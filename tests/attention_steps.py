"""Graphs of a decode step on a GPU as Inductor sees them, built call by call; values are tensors without data."""

import operator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
BATCH, HEADS, SHARED, KEYS, SIZE = 2, 8, 2, 48, 16


class Step:
    """A graph of one decode step as Inductor sees it, built call by call; `values` are tensors without data."""

    def __init__(self):
        self.graph, self.mode, self.unknown = Graph(), FakeTensorMode(shape_env=ShapeEnv()), {}

    def sizes(self, *hints):
        """Sizes that are not known when a graph is compiled, inputs of it."""
        sizes = self.mode.from_tensor(torch.empty(hints), static_shapes=False).shape
        for size in sizes:
            self.unknown[str(size)] = self.graph.placeholder(f"size_{size}")
            self.unknown[str(size)].meta["val"] = size
        return sizes

    def given(self, name, *shape, dtype=torch.bfloat16):
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="cuda")
        return node

    def call(self, target, *args, **kwargs):
        args = tree_map_only(torch.SymInt, lambda size: self.unknown[str(size)], args)
        node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.node.map_arg((args, kwargs), lambda part: part.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def repeated(self, node, heads=HEADS, copied=True):
        batch, shared, keys, size = node.meta["val"].shape
        node = self.call(aten.unsqueeze.default, node, 2)
        node = self.call(aten.expand.default, node, [batch, shared, heads // shared, keys, size])
        if copied:
            node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.reshape.default, node, [batch, heads, keys, size])

    def attention(self, target, *args, index=0, **kwargs):
        """Its result at `index`, in the shape that a model gives it next, and the graph's output."""
        node = self.call(target, *args, **kwargs)
        node = self.call(operator.getitem, node, index)
        if index == 0:
            node = self.call(aten.permute.default, node, [0, 2, 1, 3])
        self.graph.output(node)

    def rewritten(self, rewrite):
        count = rewrite(self.graph)
        self.graph.lint()
        return count, [node for node in self.graph.nodes if node.op == "call_function"]
