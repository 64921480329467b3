"""`MXLayout`: what an `MXWeight` is made of, as a value that graphs and compiled code can be keyed on."""

from dataclasses import dataclass
from typing import Any, Self

from mxcompile.kernels.layout.planes import PlanarScaling


@dataclass(frozen=True)
class MXLayout:
    """How the bytes of an MXWeight are encoded, and how the input of its matmul is prepared.

    format: of the weight. size: number of values along the blocks (the inner dimension).
    transposed: the contracted dimension is the weight's second to last one; in the packed form it is always the last.
    activation, rule: format and scale rule of the input, or None if it stays float.
    multiplier: digest of the values that the input is multiplied by (equal digests, equal values), or None. That of
        matrices for runs of n channels begins with `n:`.
    rotation: block size of the input's rotation (`hadamard.py`), applied after the multiplier, or None.
    planes: the scaling of the planar layout (`kernels/layout/planes.py`); None for row-major bytes (`packing.py`).
    """

    format: str
    size: int
    transposed: bool = False
    activation: str | None = None
    rule: str | None = None
    multiplier: str | None = None
    rotation: int | None = None
    planes: PlanarScaling | None = None

    @property
    def multiplier_shape(self) -> tuple[int, ...]:
        """The shape of the multiplier: `(size,)`, or `(size / n, n, n)` for matrices; empty without one."""
        if self.multiplier is None:
            return ()
        run, is_matrix, _ = self.multiplier.partition(":")
        if not is_matrix or not run.isdecimal() or not int(run):
            return (self.size,)
        return (self.size // int(run), int(run), int(run))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # Dynamo's guards hold a copy, and comparing an object with itself is free
