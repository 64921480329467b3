"""Round a weight column by column against the second moments of its input: what one column loses, later ones make good.

Least || (W - Q) X ||^2 = tr((W - Q) H (W - Q)^T), H = X X^T (GPTQ, Frantar et al., arXiv 2210.17323). With H = R R^T, R
upper triangular, that is || (W - Q) R ||^2, and the columns of a block do best at

    w + (w - q)[before] R[before, block] R[block, block]^-1

(GPTQ's own form has U = R^-1, the upper Cholesky factor of H^-1; none but its diagonal blocks are needed.) Inside the
block, rounding column j leaves an error e_j = (w_j - q_j) / U_jj, and the columns after it move by -e_j U_j,: . An MX
block's scale is chosen when the block is reached, among a few, for the least sum of e^2 that rounding its columns one
after the other gives. Sweeps afterwards round each block again so, all others given.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import round_steps_in_place, unit

_OFFSETS = (0, -1, 1, -2)
_MOST_DAMPING = 10.0


class Order(Enum):
    """In which order columns are rounded; blocks keep their members.

    NONE: as they are. COLUMNS: by falling diag(H). BLOCKS: blocks by falling mean of diag(H), in each its columns so.
    """

    NONE = "none"
    COLUMNS = "columns"
    BLOCKS = "blocks"


class IllConditionedError(Exception):
    """H has no usable factor, however much it is damped."""


@dataclass(frozen=True)
class ColumnRounding:
    """damping: added to diag(H), times its mean. rule: fixes scales beforehand; None searches them block by block.

    sweeps: how often each block is rounded again. microblock: columns rounded at once, with scales by `rule` from the
    weights as they then are (Sharify et al., arXiv 2405.07135, Algorithm 1, its inner update kept inside the outer
    block); 0: column by column.
    """

    format: MXFormat
    damping: float = 0.01
    order: Order = Order.BLOCKS
    rule: ScaleRule | None = None
    sweeps: int = 0
    microblock: int = 0

    def round(self, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """weight: `[out, in]`, moments H: `[in, in]`. Returns MX values `[out, in]` and scales `[out, blocks]` (E8M0).

        Raises IllConditionedError if H has no usable factor.
        """
        size, block = weight.shape[1], self.format.block_size
        padding = self.format.blocks(size) * block - size
        w = torch.nn.functional.pad(weight.float(), (0, padding))
        columns, factor, damped = self._prepared(moments, padding)
        if self.microblock:
            assert self.rule is not None
            return self._microblocks(w, factor, self.rule, size)
        exponents = None if self.rule is None else _exponents(w, self.format, self.rule)
        q, chosen = self._columns(w.T.contiguous()[columns], factor, exponents, columns)
        q = q[columns.argsort()].T
        for _ in range(self.sweeps):
            q, chosen = self._sweep(w, q, chosen, damped, exponents is None)
        return q[:, :size], (chosen + SCALE_BIAS).to(torch.uint8)

    def _prepared(self, moments: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
        """The columns in the order in which they are rounded, R of H in that order, and H damped (for sweeps)."""
        h = _padded(moments.float(), padding)
        order = Order.NONE if self.microblock else self.order
        columns = _order(h.diagonal().double(), self.format.block_size, order)
        backwards = columns.flip(0)
        lower, added = _factored(h[backwards][:, backwards].double(), self.damping)
        if self.sweeps:
            h = h + added * torch.eye(len(h), device=h.device)
        return columns, lower.float().flip(0, 1), h

    def _columns(self, w: Tensor, factor: Tensor, exponents: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
        """All columns, as rows `[in, out]` in the order given, a block's worth at a time.

        Returns values `[in, out]` and exponents `[out, blocks]`.
        """
        width = 1 if self.order is Order.COLUMNS else self.format.block_size  # of columns on one scale
        blocks = columns[::width] // self.format.block_size
        fixed = None if exponents is None else exponents[:, blocks].T.contiguous()
        own, before = _inverses(factor, width), factor.T
        q, lost, chosen = torch.empty_like(w), torch.empty_like(w), list[Tensor]()
        for index, start in enumerate(range(0, len(w), width)):
            part = slice(start, start + width)
            now = torch.addmm(w[part], own[index].T, before[part, :start] @ lost[:start])
            tried = _tried(now, self.format) if fixed is None else fixed[index : index + 1]
            q[part], best = _round_block(now, own[index], tried, self.format)
            torch.sub(w[part], q[part], out=lost[part])
            chosen.append(best)
        return q, torch.stack(chosen, 1)[:, blocks.argsort()] if exponents is None else exponents

    def _sweep(self, w: Tensor, q: Tensor, chosen: Tensor, h: Tensor, search: bool) -> tuple[Tensor, Tensor]:
        """Every block once more: its best continuous values given all others, rounded; kept where that is better."""
        block = self.format.block_size
        q, chosen = q.clone(), chosen.clone()
        gradient = (q - w) @ h
        for index in range(w.shape[1] // block):
            part = slice(index * block, (index + 1) * block)
            own = h[part, part]
            lower, _ = _factored(own.flip(0, 1).double(), 0.0)
            now = q[:, part]
            ideal = now - (gradient[:, part].double() @ own.double().inverse()).float()
            tried = _tried(ideal.T, self.format) if search else chosen[:, index].unsqueeze(0)
            rounded, best = _round_block(ideal.T, _inverses(lower.flip(0, 1), block)[0], tried, self.format)
            better = _cost(rounded.T - ideal, own) < _cost(now - ideal, own)
            step = torch.where(better.unsqueeze(1), rounded.T - now, 0.0)
            q[:, part] += step
            chosen[:, index] = torch.where(better, best, chosen[:, index]) if search else chosen[:, index]
            gradient += step @ h[part]
        return q, chosen

    def _microblocks(self, w: Tensor, factor: Tensor, rule: ScaleRule, size: int) -> tuple[Tensor, Tensor]:
        q, lost, scales = torch.empty_like(w), torch.zeros_like(w), list[Tensor]()
        for start in range(0, w.shape[1], self.microblock):
            part = slice(start, start + self.microblock)
            moved = lost[:, :start] @ factor[:start, part]
            now = w[:, part] + torch.linalg.solve_triangular(factor[part, part], moved, upper=True, left=False)
            codes, found = reference.quantize(now, self.format, rule)
            q[:, part] = reference.dequantize(codes, found, self.format, now.shape[1], torch.float32)
            lost[:, part] = w[:, part] - q[:, part]
            scales.append(found)
        return q[:, :size], torch.cat(scales, 1)


def _round_block(w: Tensor, upper: Tensor, tried: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor]:
    """The columns of a block one after the other, for each row on the best of several scales.

    w: `[block, out]`; upper: U `[block, block]`; tried: exponents `[scales, out]`. Returns values, exponents `[out]`.
    """
    shares = (upper / upper.diagonal().unsqueeze(1)).unsqueeze(-1).unsqueeze(-1)
    moving = w.unsqueeze(1) * (reference.power_of_two(-tried) * (1 / unit(fmt)))  # in steps of each scale
    rounded = torch.empty_like(moving)
    for j in range(len(w)):
        moving[j] -= round_steps_in_place(rounded[j].copy_(moving[j]), fmt)
        moving[j + 1 :].addcmul_(shares[j, j + 1 :], moving[j], value=-1)
    moving /= upper.diagonal().view(-1, 1, 1)
    errors = moving.square_().sum(0) * reference.power_of_two((tried - tried[:1]).clamp(-30, 30)).square()
    best = errors.argmin(0, keepdim=True)
    exponents = tried.gather(0, best)
    steps = rounded.gather(1, best.expand(len(rounded), 1, -1)).squeeze(1)
    return steps * (reference.power_of_two(exponents) * unit(fmt)), exponents.squeeze(0)


def _tried(w: Tensor, fmt: MXFormat) -> Tensor:
    """Exponents to try for a block `[block, out]`: the OCP one and its neighbours, `[scales, out]`."""
    floor = reference.scale_exponents(w.abs().amax(0), fmt, ScaleRule.FLOOR)
    offsets = torch.tensor(_OFFSETS, device=w.device, dtype=torch.int32).unsqueeze(1)
    return (floor + offsets).clamp(-SCALE_BIAS, SCALE_BIAS)


def _exponents(w: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Exponents `[out, blocks]` of the weight as it is."""
    return reference.quantize(w, fmt, rule)[1].to(torch.int32) - SCALE_BIAS


def _order(diagonal: Tensor, block: int, order: Order) -> Tensor:
    """Columns in the order in which they are rounded."""
    if order is Order.NONE:
        return torch.arange(len(diagonal), device=diagonal.device)
    if order is Order.COLUMNS:
        return diagonal.argsort(descending=True, stable=True)
    blocks = diagonal.view(-1, block)
    first = blocks.mean(1).argsort(descending=True, stable=True)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    return (first.unsqueeze(1) * block + inside[first]).flatten()


def _padded(h: Tensor, padding: int) -> Tensor:
    """H with columns that nothing reads."""
    if not padding:
        return h
    return torch.block_diag(h, torch.eye(padding, dtype=h.dtype, device=h.device) * h.diagonal().mean())


def _factored(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(Lower Cholesky factor of H damped, what was added to its diagonal), float64; damped more while that fails.

    Each time ten times more, up to ten means of the diagonal. Overwrites H.
    """
    diagonal = h.diagonal().clone()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise IllConditionedError("calibration showed nothing of its input")
    while damping <= _MOST_DAMPING:
        h.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed and torch.isfinite(lower).all():
            return lower, damping * mean
        damping = max(damping * 10, 1e-4)
    raise IllConditionedError("the second moments of its input cannot be factored")


def _inverses(factor: Tensor, width: int) -> Tensor:
    """Inverses `[blocks, width, width]` of the diagonal blocks of an upper triangular matrix."""
    count = len(factor) // width
    blocks = factor.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    eye = torch.eye(width, dtype=blocks.dtype, device=blocks.device).expand_as(blocks)
    return torch.linalg.solve_triangular(blocks, eye, upper=True).float()


def _cost(difference: Tensor, h: Tensor) -> Tensor:
    """d H d^T for every row."""
    return ((difference @ h) * difference).sum(1)
