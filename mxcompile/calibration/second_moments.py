"""Second moments of a matmul's input, as it is in the quantized model, and of what that lacks to the exact one.

    H = sum x x^T    D = sum (x_exact - x) x^T    Y = sum y_exact x^T    R = sum (r_exact - r) x^T    over tokens x

Y is about y = W x, and where outputs are fewer than inputs less to compute than D: what is lacking, W D = Y - W H. R is
about r, what is added to the matmul's output (the residual stream): what that has lost could be made good here.
Tokens of great energy are capped (`importance.token_weights`).
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.graph.dataflow import SAME_VALUE, operand
from mxcompile.numerics.column_rounding import IllConditionedError
from mxcompile.numerics.importance import token_weights

aten = torch.ops.aten
_PANELS, _NARROWEST = 4, 128
_PASSED = SAME_VALUE | {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class SecondMoments:
    """tokens: number of them seen. lacking: D `[in, in]`. made: Y, added: R `[out, in]` of some matmuls, by name."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = 0
        self.lacking: Tensor | None = None
        self.made: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self._inputs = torch.zeros(size, size, device=device)
        width = max(_NARROWEST, -(-size // _PANELS))
        self._panels = [(start, min(start + width, size)) for start in range(0, size, width)]

    @property
    def inputs(self) -> Tensor:
        """H `[in, in]`; not to be written to."""
        for start, end in self._panels:
            self._inputs[start:end, end:] = self._inputs[end:, start:end].T
        return self._inputs

    def update(
        self,
        x: Tensor,
        exact: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
        made: Mapping[str, Tensor] | None = None,
    ) -> None:
        """x, exact: `[tokens, in]` in quantized and exact model; added: r_exact - r, made: y `[tokens, out]`."""
        if not len(x):
            return
        x = x.float()
        weighted = x * token_weights(x)
        for start, end in self._panels:  # H is symmetric: half of it is enough
            self._inputs[start:, start:end].addmm_(weighted[:, start:].T, x[:, start:end])
        self.tokens += len(x)
        if exact is not None:
            self.lacking = _plus(self.lacking, exact.float() - x, weighted)
        for name, missing in (added or {}).items():
            self.added[name] = _plus(self.added.get(name), missing.float(), weighted)
        for name, outputs in (made or {}).items():
            self.made[name] = _plus(self.made.get(name), outputs.float(), weighted)

    def target(self, weights: Mapping[str, Tensor], damping: float, strength: float) -> Tensor:
        """Weights `[out, in]` moved by `strength` towards what comes nearest to the exact model's outputs.

        W + strength * (W D + R) H^-1, the damped least squares solution. weights: by the name of their matmul's node;
        returns all their rows (float32). Raises IllConditionedError if there is no solution.
        """
        joined = torch.cat([weight.float() for weight in weights.values()])
        if not strength or (self.lacking is None and not self.made):
            return joined
        missing = torch.cat([self._missing(weight.float(), name) for name, weight in weights.items()])
        damped = self.inputs.double()
        damped.diagonal().add_(damping * damped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        correction = torch.cholesky_solve(missing.T, lower).T
        if failed or not correction.isfinite().all():
            raise IllConditionedError("what its input lacks cannot be solved for")
        return joined + strength * correction.float()

    def _missing(self, weight: Tensor, name: str) -> Tensor:
        """W D + R `[out, in]`, float64."""
        if name in self.made:
            missing = self.made[name].double() - weight.double() @ self.inputs.double()
        else:
            assert self.lacking is not None
            missing = (weight @ self.lacking).double()
        return missing + self.added[name] if name in self.added else missing


def _plus(total: Tensor | None, values: Tensor, weighted: Tensor) -> Tensor:
    """The sum of values x^T so far, and that of more tokens; overwrites it."""
    return values.T @ weighted if total is None else total.addmm_(values.T, weighted)


def residual_operand(matmul: Matmul) -> Node | None:
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
