"""Random token ids in the form of the example inputs, for estimates that need no text."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxcompile.analysis.tensor_reads import EMBEDDING
from mxcompile.graph.inputs import Inputs, map_leaves
from mxcompile.graph.program import Program


def random_batches(program: Program, count: int) -> tuple[Inputs, ...]:
    """`count` batches like the example, with token ids drawn by seeds 0, 1, ...; the example itself without token ids.

    Token ids are the integer inputs that are looked up in the largest embedding; all other inputs stay.
    """
    vocabulary = _vocabulary(program)
    if not vocabulary:
        return (program.example,)
    return tuple(_drawn(program.example, vocabulary, seed) for seed in range(count))


def _vocabulary(program: Program) -> dict[int, int]:
    """Positions of the inputs that are token ids -> the number of tokens."""
    rows: dict[int, int] = {}
    for position, node in enumerate(program.graph.find_nodes(op="placeholder")):
        for user in node.users:
            if user.target is EMBEDDING and user.args[1] is node:
                table: Any = user.args[0]
                rows[position] = int(table.meta["val"].shape[0])
    return {position: size for position, size in rows.items() if size == max(rows.values())}


def _drawn(example: Inputs, vocabulary: dict[int, int], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    positions = iter(range(len(list(example.leaves_of(example)))))

    def draw(leaf: Any) -> Any:
        size = vocabulary.get(next(positions))
        if size is None or not isinstance(leaf, Tensor):
            return leaf
        return torch.randint(size, leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)

    args, kwargs = map_leaves(draw, (example.args, example.kwargs))
    return replace(example, args=args, kwargs=kwargs)
