"""What steps of a recipe would save of the error of the matmuls that read one value, measured on a sample of tokens.

    fold      x / s, w * s       factors of channels, as `awq-fold` searches them
    permute   x[p], w[:, p]      channels sorted by the energy of the weights' columns, as `permute` does
    rotate    H x, w H           a Hadamard rotation of each block, as `rotate` does
    bits      8-bit elements, in weights and input

Factors are chosen on one half of the tokens and judged on the other. Of each weight, up to 256 rows stand for all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mxcompile.analysis.folds.groups import ScaleGroup, representable_factors
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.searches.factor_search import Operand, output_error, power_candidates, search_factors
from mxcompile.formats import MXFP8_E4M3, MXINT8, MXFormat
from mxcompile.numerics.hadamard import rotate_input, rotate_weight
from mxcompile.numerics.importance import floored, token_weights

_ROWS, _TOKENS, _GRID = 256, 128, 5
_NO_FACTORS = torch.ones(0, dtype=torch.float32)


@dataclass(frozen=True)
class SampledValue:
    """A value and the weights that it is multiplied with.

    tokens: a sample `[tokens, in]`, float32, as `TokenSample` keeps it. importance: mean square of each channel `[in]`.
    weights: of all matmuls that read it, each `[out, in]`.
    """

    tokens: Tensor
    importance: Tensor
    weights: Sequence[Tensor]

    @classmethod
    def of(cls, tokens: Tensor, importance: Tensor, weights: Sequence[Tensor]) -> "SampledValue":
        """With at most 256 rows of all weights together, and at least one of each: many experts read one value."""
        step = max(1, sum(map(len, weights)) // _ROWS)
        return cls(tokens, importance, [weight[::step].float() for weight in weights])

    def db(self, quantizers: Quantizers) -> float:
        """SQNR in dB of the outputs, with both operands rounded."""
        operand = self._operand(self._judging)
        exact = operand.outputs(operand.inputs, lambda weight: weight)
        power = float((exact.square() * token_weights(operand.inputs)).sum())
        return _ratio_db(power, output_error([operand], quantizers)(_NO_FACTORS))

    def imbalance(self) -> float:
        """How far a channel of the value is out of proportion to its column of the weights: what a fold can balance.

        The largest over channels of |x_j| / |w_j| (root mean squares), over the median: about 1 where all channels are
        alike, f^2 for a channel that is f times larger than others and whose weights are f times smaller.
        """
        columns = torch.cat(list(self.weights)).square().mean(0)
        live = (columns > 0) & (self.importance > 0)
        ratios = (self.importance[live] / columns[live]).double().sqrt()
        return float(ratios.max() / ratios.median()) if len(ratios) else 1.0

    def saved_by_fold(self, quantizers: Quantizers, group: ScaleGroup, channels: Tensor) -> float:
        """dB that the best factors of a scale group save. channels: index of each channel's factor `[in]`."""
        magnitudes = group.mean(lambda _: self.importance.sqrt())
        columns = torch.cat(list(self.weights)).abs().mean(0)
        powers = power_candidates(magnitudes, group.mean(lambda _: columns), _GRID, activation_alone=True)
        candidates = [representable_factors(group, factors, False) for factors in powers]
        choosing, judging = (
            output_error([self._operand(tokens, channels)], quantizers) for tokens in (self._choosing, self._judging)
        )
        best = search_factors(candidates, choosing, group.count).factors
        return _ratio_db(judging(torch.ones_like(best)), judging(best))

    def saved_by_order(self, quantizers: Quantizers, order: Tensor) -> float:
        """dB that another order of channels saves. order: for each place `[in]`, the channel that comes there."""
        plain = self._operand(self._judging)
        order = order.to(self.tokens.device)
        sorted_weights = [weight[:, order] for weight in self.weights]
        other = SampledValue(self.tokens[:, order], self.importance[order], sorted_weights)
        errors = [output_error([each], quantizers)(_NO_FACTORS) for each in (plain, other._operand(other._judging))]
        return _ratio_db(*errors)

    def saved_by_rotation(self, quantizers: Quantizers, block: int) -> float:
        """dB that a rotation of blocks of 2^n channels saves."""
        every = rotate_input(self.tokens, block)
        importance = floored((every.square() * token_weights(every)).mean(0))
        rotated = self._operand(rotate_input(self._judging, block), None, importance, partial(_rotated, block))
        plain = self._operand(self._judging)
        return _ratio_db(*(output_error([each], quantizers)(_NO_FACTORS) for each in (plain, rotated)))

    def saved_by_bits(self, quantizers: Quantizers) -> float:
        """dB that 8-bit elements save, in weights and input, in blocks of the same size."""
        more = Quantizers(_eight_bits(quantizers.weight), quantizers.activation and _eight_bits(quantizers.activation))
        plain = self._operand(self._judging)
        errors = [output_error([plain], each)(_NO_FACTORS) for each in (quantizers, more)]
        return _ratio_db(*errors)

    def _operand(
        self,
        tokens: Tensor,
        channels: Tensor | None = None,
        importance: Tensor | None = None,
        convert: Callable[[Tensor], Tensor] = Tensor.float,
    ) -> Operand:
        channels = torch.full((tokens.shape[-1],), -1) if channels is None else channels
        importance = self.importance if importance is None else importance
        return Operand(tokens, importance, self.weights, channels.to(tokens.device), convert)

    @property
    def _choosing(self) -> Tensor:
        return self.tokens[::2][:_TOKENS]

    @property
    def _judging(self) -> Tensor:
        return self.tokens[1::2][:_TOKENS] if len(self.tokens) > 1 else self.tokens


def _rotated(block: int, weight: Tensor) -> Tensor:
    return rotate_weight(weight.float(), block)


def _eight_bits(fmt: MXFormat) -> MXFormat:
    """The format itself if it has 8 bits, else the 8-bit format of its kind."""
    return fmt if fmt.bits >= 8 else (MXINT8 if fmt.is_integer else MXFP8_E4M3).with_block(fmt.block_size)


def _ratio_db(above: float, below: float) -> float:
    """10 log10 of a ratio of squares; 0 if both are 0, and at most 200 either way."""
    if above == below:
        return 0.0
    return min(200.0, max(-200.0, 10 * math.log10(max(above, 1e-300) / max(below, 1e-300))))
