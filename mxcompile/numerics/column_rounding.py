"""Round a weight column by column (GPTQ): the rounding error of a column is compensated in the columns after it.

Minimizes || (W - Q) X ||^2 = tr((W - Q) H (W - Q)^T), H = X X^T (Frantar et al., arXiv 2210.17323). With H = R R^T, R
upper triangular, that is || (W - Q) R ||^2, and the best values of the columns of a block are

    w + (w - q)[before] R[before, block] R[block, block]^-1

(GPTQ uses U = R^-1, the upper Cholesky factor of H^-1; only its diagonal blocks are needed here.) Inside the block,
rounding column j leaves an error e_j = (w_j - q_j) / U_jj, and the columns after it move by -e_j U_j,: . The scale of
an MX block is chosen when the block is reached: of a few candidates, the one with the smallest sum of e^2 after its
columns are rounded in turn. Optional sweeps then round each block again with all other blocks fixed.
"""

from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import in_steps, round_steps_in_place, unit

_OFFSETS = (0, -1, 1, -2)
MOST_DAMPING = 10.0


class ColumnOrder(Enum):
    """The order in which columns are rounded; each column stays in its MX block.

    NONE: as stored. COLUMNS: by descending diag(H). BLOCKS: blocks by descending mean of diag(H), and the columns
    within each block by descending diag(H).
    """

    NONE = "none"
    COLUMNS = "columns"
    BLOCKS = "blocks"


class IllConditionedError(Exception):
    """H has no usable Cholesky factor, even with the most damping."""


@dataclass(frozen=True)
class FactoredMoments:
    """H, damped: lower is its Cholesky factor `[in, in]`, float64, for the columns in the reverse of the order in which
    they are rounded, columns. added: what damping has added to its diagonal.
    """

    columns: Tensor
    lower: Tensor
    added: Tensor

    def solve(self, values: Tensor) -> Tensor:
        """H^-1 values, both `[in, any]`, float64. The columns of a padding are left out."""
        backwards, padding = self.columns.flip(0), len(self.columns) - len(values)
        ordered = torch.nn.functional.pad(values, (0, 0, 0, padding))[backwards]
        solved = torch.cholesky_solve(ordered, self.lower)
        return torch.empty_like(solved).index_copy_(0, backwards, solved)[: len(values)]

    def unrounded(self, weight: Tensor, values: Tensor) -> Tensor:
        """What each element was when its column was reached, the errors of earlier columns compensated: `[out, in]`.

        values: what the weight has been rounded to by this factor, without sweeps and microblocks.
        """
        factor, size = self.lower.float().flip(0, 1), weight.shape[1]
        errors = torch.nn.functional.pad(weight.float() - values, (0, len(self.columns) - size))[:, self.columns]
        compensated = (errors @ factor) / factor.diagonal()
        return compensated[:, self.columns.argsort()][:, :size].add_(values)


@dataclass(frozen=True)
class ColumnRounding:
    """damping: added to diag(H), as a multiple of its mean. rule: fixes the scales beforehand; None searches them block
    by block. sweeps: how often each block is rounded again.

    microblock: number of columns rounded at once, with scales by `rule` from the weights as updated so far (Sharify et
    al., arXiv 2405.07135, Algorithm 1, with its inner update kept inside the outer block); 0: column by column.
    largest: exponent of the largest finite number of the weight's dtype, 15 for float16, which no value may exceed.
    """

    format: MXFormat
    damping: float = 0.01
    order: ColumnOrder = ColumnOrder.BLOCKS
    rule: ScaleRule | None = None
    sweeps: int = 0
    microblock: int = 0
    largest: int = SCALE_BIAS

    def round(self, weight: Tensor, moments: Tensor, factored: FactoredMoments | None = None) -> tuple[Tensor, Tensor]:
        """weight: `[out, in]`, moments H: `[in, in]`. Returns MX values `[out, in]` and scales `[out, blocks]` (E8M0).

        factored: what `factor` returns for H, if the caller has it. Raises IllConditionedError as that does.
        """
        factored = factored or self.factor(moments)
        size = weight.shape[1]
        padding = len(factored.columns) - size
        w, factor = torch.nn.functional.pad(weight.float(), (0, padding)), factored.lower.float().flip(0, 1)
        if self.microblock:
            assert self.rule is not None
            return self._microblocks(w, factor, self.rule, size)
        exponents = None if self.rule is None else self._fixed_exponents(w, self.rule)
        columns = factored.columns
        q, block_exponents = self._columns(w.T.contiguous()[columns], factor, exponents, columns)
        q = q[columns.argsort()].T
        if self.sweeps:
            h = _padded(moments.float(), padding)
            damped = h + factored.added * torch.eye(len(h), dtype=torch.float32, device=h.device)
            for _ in range(self.sweeps):
                q, block_exponents = self._sweep(w, q, block_exponents, damped, exponents is None)
        return q[:, :size], (block_exponents + SCALE_BIAS).to(torch.uint8)

    def factor(self, moments: Tensor) -> FactoredMoments:
        """The order of the columns of H `[in, in]`, and its factor. Raises IllConditionedError if it has none."""
        padding = self.format.blocks(len(moments)) * self.format.block_size - len(moments)
        h = _padded(moments.float(), padding)
        order = ColumnOrder.NONE if self.microblock else self.order
        columns = _order(h.diagonal().double(), self.format.block_size, order)
        backwards = columns.flip(0)
        return FactoredMoments(columns, *_factored(h[backwards][:, backwards].double(), self.damping))

    def _columns(self, w: Tensor, factor: Tensor, exponents: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Round all columns, given as rows `[in, out]` in rounding order, one block at a time.

        Returns values `[in, out]` and exponents `[out, blocks]`.
        """
        width = 1 if self.order is ColumnOrder.COLUMNS else self.format.block_size  # columns that share one scale
        blocks = columns[::width] // self.format.block_size
        fixed = None if exponents is None else exponents[:, blocks].T.contiguous()
        inverses, factor_rows = _inverses(factor, width), factor.T
        q, errors, block_exponents = torch.empty_like(w), torch.empty_like(w), list[Tensor]()
        round_block = _RecordedRounding(self.format) if w.is_cuda else partial(_round_block, fmt=self.format)
        for index, start in enumerate(range(0, len(w), width)):
            part = slice(start, start + width)
            target = torch.addmm(w[part], inverses[index].T, factor_rows[part, :start] @ errors[:start])
            candidates = self._candidates(target) if fixed is None else fixed[index : index + 1]
            q[part], best = round_block(target, inverses[index], candidates)
            torch.sub(w[part], q[part], out=errors[part])
            block_exponents.append(best.clone())
        return q, torch.stack(block_exponents, 1)[:, blocks.argsort()] if exponents is None else exponents

    def _sweep(self, w: Tensor, q: Tensor, block_exponents: Tensor, h: Tensor, search: bool) -> tuple[Tensor, Tensor]:
        """Round every block again from its best continuous values, all others fixed; keep it where that is better."""
        block = self.format.block_size
        q, block_exponents = q.clone(), block_exponents.clone()
        gradient = (q - w) @ h
        for index in range(w.shape[1] // block):
            part = slice(index * block, (index + 1) * block)
            h_block = h[part, part]
            lower, _ = _factored(h_block.flip(0, 1).double(), 0.0)
            target = q[:, part]
            ideal = target - (gradient[:, part].double() @ h_block.double().inverse()).float()
            candidates = self._candidates(ideal.T) if search else block_exponents[:, index].unsqueeze(0)
            rounded, best = _round_block(ideal.T, _inverses(lower.flip(0, 1), block)[0], candidates, self.format)
            better = _cost(rounded.T - ideal, h_block) < _cost(target - ideal, h_block)
            step = torch.where(better.unsqueeze(1), rounded.T - target, 0.0)
            q[:, part] += step
            block_exponents[:, index] = (
                torch.where(better, best, block_exponents[:, index]) if search else block_exponents[:, index]
            )
            gradient += step @ h[part]
        return q, block_exponents

    def _microblocks(self, w: Tensor, factor: Tensor, rule: ScaleRule, size: int) -> tuple[Tensor, Tensor]:
        q, errors, scales = torch.empty_like(w), torch.zeros_like(w), list[Tensor]()
        for start in range(0, w.shape[1], self.microblock):
            part = slice(start, start + self.microblock)
            correction = errors[:, :start] @ factor[:start, part]
            target = w[:, part] + torch.linalg.solve_triangular(factor[part, part], correction, upper=True, left=False)
            block_scales = (self._fixed_exponents(target, rule) + SCALE_BIAS).to(torch.uint8)
            codes = reference.quantize_on_scales(target, block_scales, self.format)
            q[:, part] = reference.dequantize(codes, block_scales, self.format, target.shape[1], torch.float32)
            errors[:, part] = w[:, part] - q[:, part]
            scales.append(block_scales)
        return q[:, :size], torch.cat(scales, 1)

    def _candidates(self, w: Tensor) -> Tensor:
        """Candidate exponents `[scales, out]` for a block `[block, out]`: the OCP exponent and its neighbours."""
        floor = reference.scale_exponents(w.abs().amax(0), self.format, ScaleRule.FLOOR)
        offsets = torch.tensor(_OFFSETS, device=w.device, dtype=torch.int32).unsqueeze(1)
        return (floor + offsets).clamp(-SCALE_BIAS, self.largest - self.format.emax)

    def _fixed_exponents(self, w: Tensor, rule: ScaleRule) -> Tensor:
        """Scale exponents `[out, blocks]` of a weight as it is."""
        exponents = reference.quantize(w, self.format, rule)[1].to(torch.int32) - SCALE_BIAS
        return exponents.clamp(max=self.largest - self.format.emax)


def _round_block(w: Tensor, upper: Tensor, candidates: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn, each row on the best of several candidate scales.

    w: `[block, out]`; upper: U `[block, block]`; candidates: exponents `[scales, out]`. Returns the values
    `[block, out]` and the chosen exponents `[out]`.
    """
    ratios = (upper / upper.diagonal().unsqueeze(1)).unsqueeze(-1).unsqueeze(-1)
    unrounded = in_steps(w.unsqueeze(1), candidates, fmt, unseen=w.is_cuda)
    rounded = torch.empty_like(unrounded)
    for j in range(len(w)):
        unrounded[j] -= round_steps_in_place(rounded[j].copy_(unrounded[j]), fmt)
        unrounded[j + 1 :].addcmul_(ratios[j, j + 1 :], unrounded[j], value=-1)
    unrounded /= upper.diagonal().view(-1, 1, 1)
    errors = unrounded.square_().sum(0) * reference.power_of_two((candidates - candidates[:1]).clamp(-30, 30)).square()
    best = errors.argmin(0, keepdim=True)
    exponents = candidates.gather(0, best)
    steps = rounded.gather(1, best.expand(len(rounded), 1, -1)).squeeze(1)
    return steps * (reference.power_of_two(exponents) * unit(fmt)), exponents.squeeze(0)


class _RecordedRounding:
    """`_round_block` of a GPU's blocks of one shape, recorded as a CUDA graph by the first call.

    It is two hundred small kernels a block, whose launches would take several times as long as they do. Results are
    overwritten by the next call.
    """

    def __init__(self, fmt: MXFormat) -> None:
        self._format, self._graph = fmt, torch.cuda.CUDAGraph()
        self._inputs: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, Tensor] | None = None

    def __call__(self, w: Tensor, upper: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        if self._results is None:
            return self._record(w, upper, candidates)
        for own, given in zip(self._inputs, (w, upper, candidates), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results

    def _record(self, w: Tensor, upper: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        results = _round_block(w, upper, candidates, self._format)  # also loads the kernels, which a recording cannot
        w, upper, candidates = self._inputs = w.clone(), upper.clone(), candidates.clone()
        with torch.cuda.device(w.device):
            torch.cuda.synchronize()
            # other threads may use the GPU meanwhile, as NCCL's does
            with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self._results = _round_block(w, upper, candidates, self._format)
        return results


def _order(diagonal: Tensor, block: int, order: ColumnOrder) -> Tensor:
    """Column indices in rounding order."""
    if order is ColumnOrder.NONE:
        return torch.arange(len(diagonal), device=diagonal.device)
    if order is ColumnOrder.COLUMNS:
        return diagonal.argsort(descending=True, stable=True)
    blocks = diagonal.view(-1, block)
    first = blocks.mean(1).argsort(descending=True, stable=True)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    return (first.unsqueeze(1) * block + inside[first]).flatten()


def _padded(h: Tensor, padding: int) -> Tensor:
    """H with columns for the padding, which affect no other column."""
    if not padding:
        return h
    return torch.block_diag(h, torch.eye(padding, dtype=h.dtype, device=h.device) * h.diagonal().mean())


def _factored(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of the damped H, and what was added to its diagonal, in float64.

    Damping grows tenfold until the factorization succeeds, up to ten times the mean of the diagonal. Overwrites H.
    """
    diagonal = h.diagonal().clone()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise IllConditionedError("its calibration input was all zeros or not finite")
    while damping <= MOST_DAMPING:
        h.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed and torch.isfinite(lower).all():
            return lower, damping * mean
        damping = max(damping * 10, 1e-4)
    raise IllConditionedError("the second moments of its input have no Cholesky factor")


def _inverses(factor: Tensor, width: int) -> Tensor:
    """Inverses `[blocks, width, width]` of the diagonal blocks of an upper triangular matrix."""
    count = len(factor) // width
    blocks = factor.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    eye = torch.eye(width, dtype=blocks.dtype, device=blocks.device).expand_as(blocks)
    return torch.linalg.solve_triangular(blocks, eye, upper=True).float()


def _cost(difference: Tensor, h: Tensor) -> Tensor:
    """d H d^T for every row d."""
    return ((difference @ h) * difference).sum(1)
