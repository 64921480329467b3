"""Second moments of a matmul's input in the quantized model, and of its error against the float ("exact") model.

    H = sum x x^T    D = sum (x_exact - x) x^T    Y = sum y_exact x^T    R = sum (r_exact - r) x^T    over tokens x

D is the error of the input. Y holds the exact outputs y = W x: the output error is W D = Y - W H, so where a matmul has
fewer outputs than inputs, Y replaces D, which is larger. R is the error of the residual stream r, which is added to the
matmul's output: the weight can compensate it. High-energy tokens are capped (`importance.token_weights`).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.ranks.exchange import Ranks
from mxcompile.graph.dataflow import SAME_VALUE, shapes_are_equal
from mxcompile.numerics.column_rounding import FactoredMoments, IllConditionedError
from mxcompile.numerics.importance import token_weights

aten = torch.ops.aten
_PANELS, _NARROWEST = 4, 128
_LARGEST_EXPONENT = 40  # beyond 2^40, sums of squares over many tokens come near the limits of float32
_PASSED = SAME_VALUE | {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class Outline:
    """tokens: that were seen. scale: the unit, None without values. shapes: of D, Y and R by kind and name."""

    tokens: int
    scale: float | None
    shapes: Mapping[str, Mapping[str, Sequence[int]]]


class SecondMoments:
    """size: number of input channels. tokens: how many were seen. borrowed: how many tokens' worth another value has
    lent (`add_mean`). input_error: D `[in, in]`. exact_outputs: Y, residual_errors: R, both `[out, in]` by the name of
    the matmul's node.

    owner: of several processes, the one that has the sums and rounds with them; None: all have them.

    All are in units of one power of two, which is 1 unless the values are so large or small that their squares leave
    float32.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.tokens, self.borrowed = size, 0, 0.0
        self.owner: int | None = None
        self.input_error: Tensor | None = None
        self.exact_outputs: dict[str, Tensor] = {}
        self.residual_errors: dict[str, Tensor] = {}
        self._scale: float | None = None
        self._inputs = torch.zeros(size, size, dtype=torch.float32, device=device)
        width = max(_NARROWEST, -(-size // _PANELS))
        self._panels = [(start, min(start + width, size)) for start in range(0, size, width)]

    @property
    def compared(self) -> bool:
        """Whether the exact model's rows were paired with them."""
        return self.input_error is not None or bool(self.exact_outputs)

    @property
    def inputs(self) -> Tensor:
        """H `[in, in]`; do not write to it."""
        for start, end in self._panels:
            self._inputs[start:end, end:] = self._inputs[end:, start:end].T
        return self._inputs

    def update(
        self,
        x: Tensor,
        exact: Tensor | None = None,
        residual_errors: Mapping[str, Tensor] | None = None,
        exact_outputs: Mapping[str, Tensor] | None = None,
        weight: float = 1.0,
        *,
        count_only: bool = False,
    ) -> None:
        """x, exact: the input `[tokens, in]` in the quantized and in the exact model. residual_errors: r_exact - r,
        exact_outputs: y_exact, both `[tokens, out]`. weight: how much each of these tokens counts. count_only: count
        the tokens and nothing else.
        """
        if not len(x) or count_only:
            self.tokens += len(x)
            return
        x = x.float()
        counts, scale = token_weights(x), self._unit(x)
        exact = None if exact is None else (exact.float() - x) * scale
        x = x * scale if scale != 1 else x
        weighted = x * (counts * weight)
        for start, end in self._panels:  # H is symmetric: compute the lower half only
            self._inputs[start:, start:end].addmm_(weighted[:, start:].T, x[:, start:end])
        self.tokens += len(x)
        if exact is not None:
            self.input_error = _accumulated(self.input_error, exact, weighted)
        for name, error in (residual_errors or {}).items():
            self.residual_errors[name] = _accumulated(self.residual_errors.get(name), error.float() * scale, weighted)
        for name, outputs in (exact_outputs or {}).items():
            self.exact_outputs[name] = _accumulated(self.exact_outputs.get(name), outputs.float() * scale, weighted)

    def add_mean(self, other: "SecondMoments", count: float) -> None:
        """Add the second moments of `count` tokens like those of another value of the same size, which has some.

        H += count / n * H_other
        """
        self._scale = self._scale or other._scale
        units = (self._scale or 1.0) / (other._scale or 1.0)
        self._inputs.add_(other._inputs, alpha=count / other.tokens * units**2)
        self.borrowed += count

    def with_tokens(self, tokens: int) -> "SecondMoments":
        """These moments as those of a value of which so many tokens were seen; H is shared."""
        copied = copy.copy(self)
        copied.tokens, copied.borrowed = tokens, self.borrowed + self.tokens
        return copied

    def of_rows(self, rows: Mapping[str, slice]) -> "SecondMoments":
        """The same moments with only some rows of Y and R, by the name of the matmul's node."""
        part = copy.copy(self)
        part.exact_outputs = {name: outputs[rows[name]] for name, outputs in self.exact_outputs.items()}
        part.residual_errors = {name: error[rows[name]] for name, error in self.residual_errors.items()}
        return part

    def outline(self) -> "Outline":
        """What other processes need to know before the moments of all are summed."""
        shapes = {kind: {name: part.shape for name, part in named.items()} for kind, named in self._named().items()}
        return Outline(self.tokens, self._scale, shapes)

    def conform(self, outlines: "Sequence[Outline]") -> None:
        """Take the unit, the parts and the number of tokens that the moments of all processes have together.

        Afterwards `parts` of all processes may be added up.
        """
        scale = next((each.scale for each in outlines if each.scale is not None), None)
        if scale is not None and self._scale not in (scale, None):
            for part in (self._inputs, *self.parts()[len(self._panels) :]):
                part.mul_((scale / self._scale) ** 2)
        self._scale, self.tokens = scale, sum(each.tokens for each in outlines)
        for outline in outlines:
            for kind, shapes in outline.shapes.items():
                for name, shape in shapes.items():
                    self._add_part(kind, name, shape)

    def parts(self) -> list[Tensor]:
        """All sums, as views: the lower half of H in panels, then D, Y and R."""
        panels = [self._inputs[start:, start:end] for start, end in self._panels]
        return [*panels, *(named[name] for named in self._named().values() for name in sorted(named))]

    def _named(self) -> dict[str, dict[str, Tensor]]:
        error = {} if self.input_error is None else {"": self.input_error}
        return {"D": error, "Y": self.exact_outputs, "R": self.residual_errors}

    def _add_part(self, kind: str, name: str, shape: Sequence[int]) -> None:
        """Add zeros for a part that only other processes have."""
        if name not in self._named()[kind]:
            zeros = torch.zeros(*shape, dtype=torch.float32, device=self._inputs.device)
            if kind == "D":
                self.input_error = zeros
            else:
                self._named()[kind][name] = zeros

    def _unit(self, x: Tensor) -> float:
        """The power of two that all values are multiplied by, chosen by the first that are not zero."""
        if self._scale is None:
            largest = float(x.abs().amax())
            if not 0 < largest < math.inf:
                return 1.0
            exponent = math.frexp(largest)[1]
            self._scale = 2.0**-exponent if abs(exponent) > _LARGEST_EXPONENT else 1.0
        return self._scale

    def target(self, weights: Mapping[str, Tensor], factored: FactoredMoments, strength: float) -> Tensor:
        """Weights moved by `strength` towards those whose outputs come nearest to the exact model's.

        W + strength * (W D + R) H^-1, the damped least-squares solution. weights: `[out, in]` by the name of their
        matmul's node; factored: H. Returns all their rows, float32. Raises IllConditionedError if the system cannot be
        solved.
        """
        joined = torch.cat([weight.float() for weight in weights.values()])
        if not strength or not self.compared:
            return joined
        error = torch.cat([self._output_error(weight.float(), name) for name, weight in weights.items()])
        correction = factored.solve(error.T).T
        if not correction.isfinite().all():
            raise IllConditionedError("the correction for its input error cannot be solved for")
        return joined + strength * correction.float()

    def _output_error(self, weight: Tensor, name: str) -> Tensor:
        """W D + R `[out, in]`, float64."""
        if name in self.exact_outputs:
            error = self.exact_outputs[name].double() - weight.double() @ self.inputs.double()
        else:
            assert self.input_error is not None
            error = (weight @ self.input_error).double()
        return error + self.residual_errors[name] if name in self.residual_errors else error


def sum_moments(moments: Sequence[SecondMoments], ranks: Ranks, by_owners: bool = False) -> None:
    """Sum the moments of all processes, in place. by_owners: each at one process alone, so that all have equal work."""
    if ranks.count == 1:
        return
    outlines = list(zip(*ranks.gather([each.outline() for each in moments]), strict=True))
    for each, of_all in zip(moments, outlines, strict=True):
        each.conform(of_all)
    owners = ranks.owners([float(each.tokens > 0) for each in moments])
    for each, owner in zip(moments, owners, strict=True):
        each.owner = owner if by_owners else None
        for part in each.parts():
            if by_owners:
                ranks.sum_at(part, owner)
            else:
                ranks.sum(part)


def _accumulated(total: Tensor | None, values: Tensor, weighted: Tensor) -> Tensor:
    """total + sum of values x^T over more tokens, computed in place."""
    return values.T @ weighted if total is None else total.addmm_(values.T, weighted)


def residual_operand(matmul: Matmul) -> Node | None:
    """The other operand of the addition that is the only reader of a matmul's output (the residual), or None."""
    node = matmul.node
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if not isinstance(other, Node) or not shapes_are_equal(other.meta["val"].shape, user.meta["val"].shape):
                return None
            return other
        if user.target not in _PASSED:
            return None
        node = user
    return None
