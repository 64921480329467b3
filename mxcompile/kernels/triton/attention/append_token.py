"""The bookkeeping after the choice of a token in one launch; in torch it is some fifteen, of 1 to 2 us each."""

# ruff: noqa: N803  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.kernels.triton.launches import launch

_MOST_ROWS: Final = 1024
_MOST_ENDS: Final = 32


def supports(ends: Tensor | None, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> str | None:
    """None if `append` takes these tensors, else what it does not take."""
    if len(ids) > _MOST_ROWS or (ends is not None and len(ends) > _MOST_ENDS):
        return f"more than {_MOST_ROWS} sequences or {_MOST_ENDS} end tokens"
    for name, tensor in (("input_ids", ids), ("position_ids", positions)):
        if tensor is not None and (tensor.dtype != torch.int64 or not tensor.is_contiguous()):
            return f"{name} are not contiguous int64"
    if mask is not None and (mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.stride(3) != 1):
        return "attention_mask is not [batch, 1, 1, cache]"
    return None


def append(
    chosen: Tensor,
    valid: Tensor | None,
    report: Tensor,
    tokens: Tensor,
    length: Tensor,
    ends: Tensor | None,
    pad: Tensor,
    ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    cache_length: Tensor,
) -> None:
    """Append a token to each row of sequences, and make the inputs of a decode step those of the next, in place.

    chosen, valid: [batch]. report: [3, batch], tokens: [batch, room], length: [1], ends: [n], pad: scalar; see
    `Sequences`. ids, positions, mask, cache_length: see `advance`. All int64 but valid, bool, and the mask.
    """
    batch = len(chosen)
    bits = None if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    launch(
        _append_kernel,
        1,
        chosen,
        chosen if valid is None else valid.view(torch.uint8),
        report,
        tokens,
        tokens.stride(0),
        length,
        chosen if ends is None else ends,
        pad,
        ids,
        ids if positions is None else positions,
        0 if positions is None else positions.numel(),
        ids if bits is None else bits,
        0 if bits is None else bits.stride(0),
        0 if bits is None else len(bits),
        0 if bits is None else bits.shape[3],
        cache_length,
        batch,
        HAS_VALID=valid is not None,
        HAS_MASK=bits is not None,
        ROWS=triton.next_power_of_2(max(batch, 0 if positions is None else positions.numel())),
        ENDS=0 if ends is None else len(ends),
        num_warps=1,  # no thread changes a value before all have read it
    )


@triton.jit
def _append_kernel(
    chosen,
    valid,
    report,
    tokens,
    tokens_stride,
    length,
    ends,
    pad,
    ids,
    positions,
    position_count,
    mask,
    mask_stride,
    mask_rows,
    mask_size,
    cache_length,
    batch,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    inside = row < batch
    token = tl.load(chosen + row, mask=inside, other=0)
    goes_on = tl.load(report + batch + row, mask=inside, other=0)
    if ENDS:
        token = tl.where(goes_on != 0, token, tl.load(pad))
        for index in tl.static_range(ENDS):
            goes_on = tl.where(token == tl.load(ends + index), 0, goes_on)
    at = tl.load(length)
    tl.store(tokens + row.to(tl.int64) * tokens_stride + at, token, mask=inside)
    tl.store(report + row, token, mask=inside)
    tl.store(report + batch + row, goes_on, mask=inside)
    if HAS_VALID:
        known = tl.load(report + 2 * batch + row, mask=inside, other=0)
        tl.store(report + 2 * batch + row, known & tl.load(valid + row, mask=inside, other=0), mask=inside)
    tl.store(length, at + 1)
    tl.store(ids + row, token, mask=inside)
    moves = row < position_count
    tl.store(positions + row, tl.load(positions + row, mask=moves, other=0) + 1, mask=moves)
    if HAS_MASK:
        column = tl.minimum(tl.load(cache_length), mask_size - 1)  # the last token of a cache has none after it
        cells = mask + row.to(tl.int64) * mask_stride + column
        has_mask = row < mask_rows
        tl.store(cells, tl.load(cells - 1, mask=has_mask, other=0), mask=has_mask)
