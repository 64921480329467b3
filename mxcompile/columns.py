"""Round a weight column by column against the second moments of its input: what one column loses, later ones make good.

Least || (W - Q) X ||^2 = tr((W - Q) H (W - Q)^T), H = X X^T (GPTQ, Frantar et al., arXiv 2210.17323). With U the upper
Cholesky factor of H^-1, rounding column j leaves an error e_j = (w_j - q_j) / U_jj, and the columns after it move by
-e_j U_j,: . An MX block's scale is chosen when the block is reached, among a few, for the least sum of e^2 that
rounding its columns one after the other gives. Sweeps afterwards round each block again so, all others given.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mxcompile import reference
from mxcompile.formats import SCALE_BIAS, MXFormat, ScaleRule
from mxcompile.nearest import round_steps_in_place, unit

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
        h = _padded(moments.double(), padding)
        columns = _order(h.diagonal(), block, Order.NONE if self.microblock else self.order)
        back = columns.argsort()
        damped, upper = _factored(h[columns][:, columns], self.damping)
        if self.microblock:
            assert self.rule is not None
            return self._microblocks(w, upper, self.rule, size)
        exponents = None if self.rule is None else _exponents(w, self.format, self.rule)
        q, chosen = self._columns(w[:, columns], upper, exponents, columns)
        q = q[:, back]
        for _ in range(self.sweeps):
            q, chosen = self._sweep(w, q, chosen, damped[back][:, back].float(), exponents is None)
        return q[:, :size], (chosen + SCALE_BIAS).to(torch.uint8)

    def _columns(self, w: Tensor, upper: Tensor, exponents: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
        """All columns, in the order given, a block's worth at a time; returns values and exponents `[out, blocks]`."""
        block = self.format.block_size
        w, q = w.clone(), torch.empty_like(w)
        chosen = torch.empty(len(w), w.shape[1] // block, dtype=torch.int32, device=w.device)
        for start in range(0, w.shape[1], block):
            part = slice(start, start + block)
            if exponents is None:
                tried = _tried(w[:, part], self.format)
            else:
                tried = exponents[:, columns[part] // block].T.unsqueeze(1)
            q[:, part], best, error = _round_block(w[:, part], upper[part, part], tried, self.format)
            if exponents is None:
                chosen[:, columns[start] // block] = best
            w[:, start + block :] -= error @ upper[part, start + block :]
        return q, chosen if exponents is None else exponents

    def _sweep(self, w: Tensor, q: Tensor, chosen: Tensor, h: Tensor, search: bool) -> tuple[Tensor, Tensor]:
        """Every block once more: its best continuous values given all others, rounded; kept where that is better."""
        block = self.format.block_size
        q, chosen = q.clone(), chosen.clone()
        gradient = (q - w) @ h
        for index in range(w.shape[1] // block):
            part = slice(index * block, (index + 1) * block)
            own, upper = _factored(h[part, part].double(), 0.0)
            now = q[:, part]
            ideal = now - (gradient[:, part].double() @ own.inverse()).float()
            tried = _tried(ideal, self.format) if search else chosen[:, index].view(1, 1, -1)
            rounded, best, _ = _round_block(ideal, upper, tried, self.format)
            better = _cost(rounded - ideal, own.float()) < _cost(now - ideal, own.float())
            step = torch.where(better.unsqueeze(1), rounded - now, 0.0)
            q[:, part] += step
            chosen[:, index] = torch.where(better, best, chosen[:, index]) if search else chosen[:, index]
            gradient += step @ h[part]
        return q, chosen

    def _microblocks(self, w: Tensor, upper: Tensor, rule: ScaleRule, size: int) -> tuple[Tensor, Tensor]:
        w, q, scales = w.clone(), torch.empty_like(w), list[Tensor]()
        for start in range(0, w.shape[1], self.microblock):
            part = slice(start, start + self.microblock)
            codes, found = reference.quantize(w[:, part], self.format, rule)
            q[:, part] = reference.dequantize(codes, found, self.format, q[:, part].shape[1], torch.float32)
            scales.append(found)
            error = torch.linalg.solve_triangular(upper[part, part], w[:, part] - q[:, part], upper=True, left=False)
            w[:, part.stop :] -= error @ upper[part, part.stop :]
        return q[:, :size], torch.cat(scales, 1)


def _round_block(w: Tensor, upper: Tensor, tried: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of a block one after the other, for each row on the best of several scales.

    w `[out, block]`; tried: exponents `[block or 1, scales, out]`. Returns values, exponents `[out]` (of the first
    column), and the errors e `[out, block]`.
    """
    block, count = w.shape[1], tried.shape[1]
    down = (reference.power_of_two(-tried) * (1 / unit(fmt))).expand(block, -1, -1)
    up = (reference.power_of_two(tried) * unit(fmt)).expand(block, -1, -1)
    moving = w.T.unsqueeze(1).repeat(1, count, 1)
    errors, values = torch.empty_like(moving), torch.empty_like(moving)
    factors = upper.float()
    for j, pivot in enumerate(factors.diagonal().tolist()):
        values[j] = round_steps_in_place(moving[j] * down[j], fmt).mul_(up[j])
        errors[j] = (moving[j] - values[j]) / pivot
        moving[j + 1 :] -= factors[j, j + 1 :].view(-1, 1, 1) * errors[j]
    best = errors.square().sum(0).argmin(0)
    pick = best.view(1, 1, -1).expand(block, 1, -1)
    exponents = tried[0].gather(0, best.unsqueeze(0)).squeeze(0)
    return values.gather(1, pick).squeeze(1).T, exponents, errors.gather(1, pick).squeeze(1).T


def _tried(w: Tensor, fmt: MXFormat) -> Tensor:
    """Exponents to try for a block `[out, block]`: the OCP one and its neighbours, `[1, scales, out]`."""
    floor = reference.scale_exponents(w.abs().amax(1), fmt, ScaleRule.FLOOR)
    offsets = torch.tensor(_OFFSETS, device=w.device, dtype=torch.int32).view(1, -1, 1)
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
    """(H damped, U float32), U^T U = H^-1; damped ten times more, up to ten means, while that fails."""
    mean = h.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise IllConditionedError("calibration showed nothing of its input")
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    while damping <= _MOST_DAMPING:
        full = h + damping * mean * eye
        lower, failed = torch.linalg.cholesky_ex(full)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return full, upper.float()
        damping = max(damping * 10, 1e-4)
    raise IllConditionedError("the second moments of its input cannot be factored")


def _cost(difference: Tensor, h: Tensor) -> Tensor:
    """d H d^T for every row."""
    return ((difference @ h) * difference).sum(1)
