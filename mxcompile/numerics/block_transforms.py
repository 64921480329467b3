"""Block-diagonal transforms of channels that give inputs and weights the same moments (WUSH).

    x [..., in] -> T x_b for each run of n channels         w [..., in] -> w_b T^-1          so that x w^T is unchanged

With R^T R the second moment of a run of the input, W its columns of all weights that read it `[out, n]`, and
R W^T = V S U, the transform is T = H S^1/2 V^T R^-T, H a Hadamard matrix: then E[x' x'^T] and w'^T w' are both
proportional to H S H^T, so that all channels of a block have the same energy, in inputs and in weights (WUSH, Chen et
al., arXiv 2512.00956).
"""

import torch
from torch import Tensor

from mxcompile.numerics.hadamard import rotate_weight
from mxcompile.numerics.row_slices import row_wise

_DAMPING = 0.01  # of the second moments and the singular values, in units of their mean


def apply_to_blocks(x: Tensor, transforms: Tensor) -> Tensor:
    """T x_b for every run of channels: x `[..., in]`, transforms T `[in / n, n, n]`.

    Computed in float32 (float64 for float64) and rounded once.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    runs = x.to(wide).unflatten(-1, transforms.shape[:2])
    return torch.einsum("...bj,bij->...bi", runs, transforms.to(wide)).flatten(-2).to(x.dtype)


def undo_in_weight(w: Tensor, transforms: Tensor) -> Tensor:
    """w_b T^-1 for every run of a weight `[..., in]`, so that the product with a transformed input is unchanged."""
    inverses = torch.linalg.inv(transforms.double()).transpose(-1, -2).to(w.device)

    def convert(rows: Tensor) -> tuple[Tensor]:
        return (apply_to_blocks(rows.double(), inverses).to(rows.dtype),)

    return row_wise(convert, w)[0]


def whitening_transforms(moments: Tensor, weight: Tensor) -> Tensor:
    """T `[in / n, n, n]`, float64, from second moments of the input `[in / n, n, n]` and a weight `[out, in]`.

    n is a power of two. Moments and singular values are damped by a hundredth of their mean. Each T is as large as an
    orthogonal matrix.
    """
    size = moments.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device=moments.device)
    moments = moments.double()
    mean = moments.diagonal(dim1=-1, dim2=-2).mean(-1).clamp(min=1e-30)[:, None, None]
    upper = torch.linalg.cholesky(moments + _DAMPING * mean * eye).transpose(-1, -2)
    columns = weight.double().unflatten(-1, (-1, size)).transpose(0, 1)
    gram = columns.transpose(-1, -2) @ columns
    # R W^T W R^T = V S^2 V^T
    squares, vectors = torch.linalg.eigh(upper @ gram @ upper.transpose(-1, -2))
    values = squares.clamp(min=0).sqrt() / len(weight) ** 0.5
    values = values + _DAMPING * values.mean(-1, keepdim=True) + 1e-30
    whitened = torch.linalg.solve_triangular(upper, vectors, upper=True).transpose(-1, -2)  # V^T R^-T
    halvings = size.bit_length() - 1
    hadamard = rotate_weight(eye, size) * 2.0 ** (halvings // 2 - halvings / 2)
    transforms = hadamard @ (values.sqrt().unsqueeze(-1) * whitened)
    return transforms * (size**0.5 / torch.linalg.matrix_norm(transforms, keepdim=True))
