"""Second moments of experts: those of an expert with few tokens are shrunk towards those of all experts' tokens.

    H = H_e + n0 * mean H_all        n0 = shrinkage * in; sums over the n_e tokens of expert e, a mean over all tokens

As means over tokens that is (1 - s) mean H_e + s mean H_all with s = n0 / (n_e + n0): an expert without tokens has the
mean of all, one with many tokens its own. GPTQ does not depend on the size of H.

"All tokens" are the rows of the value that the experts multiply, whichever expert they are of. In front of the up
projections each token counts as often as experts are chosen for it: as a mean, that is the model's own distribution of
tokens. In front of the down projections there is a value only for the chosen pairs of token and expert, so the mean is
over all of these: routing is never changed. Both are sums over tokens and can be merged over devices and processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.runs.run import NO_TOKENS
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.graph.dataflow import operand

_LISTED = 6


class ExpertTokens(Enum):
    """The tokens that an expert's second moments are of: those that the router sends to it, or those of all experts."""

    CHOSEN = "chosen"
    ALL = "all"


@dataclass(frozen=True)
class ExpertStatistics:
    """shrinkage: n0 in units of input channels; 0: an expert's own tokens alone. It has no effect with `ALL`."""

    tokens: ExpertTokens = ExpertTokens.CHOSEN
    shrinkage: float = 2.0

    @property
    def uses_own(self) -> bool:
        """Whether the moments of an expert's own tokens are needed, and not only their number."""
        return self.tokens is ExpertTokens.CHOSEN

    @property
    def uses_all(self) -> bool:
        """Whether the moments of all experts' tokens are needed."""
        return not self.uses_own or self.shrinkage > 0

    def combine(self, own: SecondMoments, everyone: SecondMoments | None) -> SecondMoments:
        """The moments to round an expert with; `tokens` are its own. Changes `own`; everyone: of all experts' tokens.

        Sums over all batches and processes must be complete.
        """
        if everyone is None or not everyone.tokens:
            return own
        if self.uses_own:
            own.add_mean(everyone, self.shrinkage * own.size)
            return own
        shared = everyone.with_tokens(own.tokens)
        shared.owner = own.owner
        return shared


def expert_offsets(matmul: Matmul) -> Node | None:
    """The node of a grouped matmul's offsets (where each expert's rows end); None for other matmuls."""
    offsets = operand(matmul.node, 2) if "grouped_mm" in str(matmul.node.target) else None
    return offsets if isinstance(offsets, Node) else None


def expert_rows(x: Tensor, offsets: Tensor | None, experts: int, mask: Tensor | None = None) -> list[Tensor]:
    """The rows `[tokens, in]` that each expert multiplies.

    x: with offsets `[tokens, in]`, sorted by expert; else `[experts, tokens, in]`, without the rows of zeros of tokens
    for which another expert is chosen, or an input that all experts read: the same tensor for each of them.
    mask: the rows that count, of x's shape without `in`.
    """
    if mask is not None:
        mask = mask.reshape(x.shape[:-1])
    if offsets is not None:
        parts = [slice(start, end) for start, end in pairwise([0, *offsets.tolist()])]
        return [x[part] if mask is None else x[part][mask[part]] for part in parts]
    if x.dim() == 3 and x.shape[0] == experts:
        chosen = x.ne(0).any(-1) if mask is None else x.ne(0).any(-1) & mask
        return [rows[kept] for rows, kept in zip(x, chosen, strict=True)]
    return [x.reshape(-1, x.shape[-1]) if mask is None else x[mask]] * experts


def rows_of_all(rows: Sequence[Tensor]) -> Tensor:
    """The rows `[tokens, in]` of all experts; an input that all experts read counts once."""
    return rows[0] if all(each is rows[0] for each in rows) else torch.cat([*rows])


class TokenTally:
    """counts: the calibration tokens of a matmul, or of each of its experts. compared: whether any were paired with
    those of the exact model.

    min_tokens: with fewer, an expert is rounded to nearest.
    """

    def __init__(self, matmul: Matmul, min_tokens: int) -> None:
        self.counts: list[int] = []
        self.compared = False
        self.of_experts = len(matmul.root.meta["val"].shape) == 3
        self._channels = matmul.in_features
        self._least = min_tokens if self.of_experts else 1
        self._alone = True

    def add(self, moments: SecondMoments) -> bool:
        """Count the tokens of the next expert; returns whether its moments are to be used."""
        self.counts.append(moments.tokens)
        self.compared = self.compared or moments.compared
        if not moments.borrowed:
            self._least = max(1, self._least)
        else:
            self._alone = False
        return moments.tokens >= self._least

    def remarks(self) -> list[str]:
        """What few tokens have led to."""
        if not self.of_experts:
            return _few_tokens(self.counts[0], self._channels)
        total, remarks = len(self.counts), list[str]()
        if few := [index for index, count in enumerate(self.counts) if count < self._least]:
            listed = ", ".join(f"expert {index}: {self.counts[index]}" for index in few[:_LISTED])
            listed += ", ..." if len(few) > _LISTED else ""
            tokens = "token" if self._least == 1 else "tokens"
            reason = f"fewer than {self._least} calibration {tokens} ({listed})"
            remarks.append(f"{len(few)} of {total} experts rounded to nearest: {reason}")
        if self._alone and (deficient := sum(self._least <= count < self._channels for count in self.counts)):
            having = f"{deficient} of {total} experts have fewer calibration tokens than the {self._channels}"
            remarks.append(f"{having} input channels: their second moments are rank-deficient")
        return remarks


def _few_tokens(count: int, channels: int) -> list[str]:
    if not count:
        return [f"rounded to nearest: {NO_TOKENS}"]
    if count < channels:
        return [f"{count} calibration tokens for {channels} input channels: the second moments are rank-deficient"]
    return []
