"""x -> x in a random order of channels: the control for `permute`, which sorts them."""

from dataclasses import dataclass

import torch

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.orders import find_orders, reorder
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassResult
from mxcompile.pipeline.interfaces import Pass


@dataclass(frozen=True)
class RandomOrder(Pass):
    """values: of groups of one kind, or all."""

    seed: int
    values: str = "all"
    name = "random"
    preserves_function = True

    def run(self, program: Program) -> PassResult:
        """Put the channels of every group in a random order."""
        generator = torch.Generator().manual_seed(self.seed)
        groups = [g for g in find_orders(program, choose(program).matmuls)[0] if self.values in ("all", g.kind.value)]
        for group in groups:
            reorder(program, group, group.sorted_by(torch.rand(group.count, generator=generator)))
        return PassResult(len(groups))
