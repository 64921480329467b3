"""Second moments of a matmul's input, as it is in the quantized model, and of what that lacks to the exact one.

    H = sum x x^T      D = sum (x_exact - x) x^T      R = sum (r_exact - r) x^T      over tokens x

R is about r, what is added to the matmul's output (the residual stream): what that has lost could be made good here.
Tokens of great energy are capped (`importance.token_weights`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.dataflow import SAME_VALUE, operand
from mxcompile.analysis.matmuls import Matmul
from mxcompile.columns import IllConditionedError
from mxcompile.importance import token_weights

aten = torch.ops.aten
_PASSED = SAME_VALUE | {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass
class Moments:
    """inputs H `[in, in]`, of that many tokens; lacking D `[in, in]`; added: R `[out, in]` of some matmuls, by name."""

    inputs: Tensor
    tokens: int = 0
    lacking: Tensor | None = None
    added: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of_size(cls, size: int, device: torch.device) -> "Moments":
        """No tokens seen yet."""
        return cls(torch.zeros(size, size, device=device))

    def update(self, x: Tensor, exact: Tensor | None = None, added: Mapping[str, Tensor] | None = None) -> None:
        """x, exact: `[tokens, in]` in the quantized and in the exact model; added: r_exact - r `[tokens, out]`."""
        if not len(x):
            return
        x = x.float()
        weighted = x * token_weights(x)
        self.inputs += weighted.T @ x
        self.tokens += len(x)
        if exact is not None:
            difference = (exact.float() - x).T @ weighted
            self.lacking = difference if self.lacking is None else self.lacking + difference
        for name, missing in (added or {}).items():
            moment = missing.float().T @ weighted
            self.added[name] = self.added[name] + moment if name in self.added else moment

    def target(self, weight: Tensor, name: str, damping: float, strength: float) -> Tensor:
        """The weight `[out, in]` (float32) moved by `strength` towards what comes nearest to the exact model's outputs.

        W + strength * (W D + R) H^-1, the damped least squares solution for the matmul of that node name.
        Raises IllConditionedError if there is none.
        """
        weight = weight.float()
        if not strength or self.lacking is None:
            return weight
        missing = weight @ self.lacking
        if name in self.added:
            missing = missing + self.added[name]
        mean = self.inputs.diagonal().mean()
        damped = self.inputs.double() + damping * mean * torch.eye(len(self.inputs), device=weight.device)
        correction, failed = torch.linalg.solve_ex(damped, missing.double().T)
        if failed or not correction.isfinite().all():
            raise IllConditionedError("what its input lacks cannot be solved for")
        return weight + strength * correction.T.float()


def added_to(matmul: Matmul) -> Node | None:
    """What is added to a matmul's output: the other operand of the addition that alone reads it."""
    node = matmul.node
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
            other = user.args[1] if user.args[0] is node else user.args[0]
            same = isinstance(other, Node) and other.meta["val"].shape == user.meta["val"].shape
            return other if same and isinstance(other, Node) else None
        if user.target not in _PASSED:
            return None
        node = user
    return None


def expert_offsets(matmul: Matmul) -> Node | None:
    """For a grouped matmul, the node that says where each expert's rows end."""
    offsets = operand(matmul.node, 2) if "grouped_mm" in str(matmul.node.target) else None
    return offsets if isinstance(offsets, Node) else None


def expert_rows(x: Tensor, offsets: Tensor | None, experts: int) -> list[Tensor]:
    """The rows `[tokens, in]` that each expert multiplies.

    x: `[tokens, in]`, sorted by expert, with offsets; else `[experts, tokens, in]`, or anything that all experts read.
    """
    if offsets is not None:
        return [x[start:end] for start, end in pairwise([0, *offsets.tolist()])]
    if x.dim() == 3 and x.shape[0] == experts:
        return list(x)
    return [x.reshape(-1, x.shape[-1])] * experts
