"""linear(norm(x) * g, w) -> linear(norm(x) * (g / s), w * s): move outliers from activations into weights.

s_j = max|X_j|**alpha / max_l|W_l,j|**(1 - alpha), the maximum over all quantized weights that read the value (Xiao et
al., SmoothQuant, arXiv 2211.10438, eq. 4). The value and its readers are found from data flow; what cannot be folded is
left alone and reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import finite_rows
from mxcompile.analysis.norms import NormGroup, find_norm_groups
from mxcompile.calibration.observers import ChannelAbsMax
from mxcompile.calibration.run import Request
from mxcompile.ledger import PassResult
from mxcompile.pipeline import Pass
from mxcompile.program import Program

_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """alpha: how much of an outlier moves into the weights, 0 (none) to 1 (all)."""

    alpha: float = 0.5

    name = "smooth-quant"
    preserves_function = True

    def requests(self, program: Program) -> Sequence[Request]:
        """The largest magnitude of every channel that will be smoothed."""
        groups, _ = find_norm_groups(program, choose(program).matmuls)
        return [Request(group.value.name, ChannelAbsMax) for group in groups]

    def run(self, program: Program) -> PassResult:
        """Fold the smoothing factors into the norms and the weights of all their readers."""
        choice = choose(program)
        groups, misses = find_norm_groups(program, choice.matmuls)
        quantized = {matmul.node for matmul in choice.matmuls}
        for group in groups:
            absmax = program.statistics[Request(group.value.name, ChannelAbsMax).key]
            weights = [finite_rows(program, m) for m in group.consumers if m.node in quantized]
            _fold(program, group, self._smoothing(absmax, weights))
        return PassResult(len(groups), tuple(misses))

    def _smoothing(self, absmax: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Factors `[in]` (float32) by which the activation's channels are divided."""
        largest = torch.stack([w.float().abs().flatten(0, -2).amax(0) for w in weights]).amax(0)
        activation, weight = absmax.clamp(min=_SMALLEST), largest.clamp(min=_SMALLEST)
        return activation**self.alpha / weight ** (1 - self.alpha)


def _fold(program: Program, group: NormGroup, smoothing: Tensor) -> None:
    """Divide the norm's channels by `smoothing` `[in]` and multiply every consumer's input columns by it."""
    norm = program.tensor(group.weight).detach()
    scaled = (norm.float() + group.offset) / smoothing - group.offset
    program.set_tensor(group.weight, scaled.to(norm.dtype))
    if group.bias is not None:
        bias = program.tensor(group.bias).detach()
        program.set_tensor(group.bias, (bias.float() / smoothing).to(bias.dtype))
    for matmul in group.consumers:
        weight = program.tensor(matmul.parameter).detach()
        rows = matmul.rows(weight).float() * smoothing
        program.set_tensor(matmul.parameter, matmul.rows(rows).to(weight.dtype).contiguous())
