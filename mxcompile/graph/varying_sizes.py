"""Which sizes of the example inputs may vary in a trace: as many as torch can follow, in a reasonable time.

Sizes that vary become symbols. A model that cuts an image into windows computes with its height and width until each
size is an expression of hundreds of characters, on which torch works for minutes; one that compares them with floats
fails. Such images are traced at their size, and only batches, and lengths of texts, vary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mxcompile.graph.inputs import Inputs

_LONGEST: Final = 200
"""Characters of a size that torch still works on quickly; padding lengths to whole chunks takes about 110."""


class UnwieldySizeError(Exception):
    """A size became an expression that is too long."""


class _LongSizesRefused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for size in result.shape if isinstance(result, Tensor) else ():
            if isinstance(size, torch.SymInt) and len(str(size)) > _LONGEST:
                raise UnwieldySizeError(f"a size of the inputs leads to {size}")
        return result


@dataclass(frozen=True)
class Attempt:
    """Inputs to trace with, and whether sizes of images vary too: all but the batch of float inputs otherwise."""

    inputs: Inputs
    images_vary: bool

    def dynamic_dimensions(self, leaf: object) -> dict[int, Any] | None:
        """What torch.export calls the dynamic shape of an argument."""
        if not isinstance(leaf, Tensor):
            return None
        varying = leaf.dim() if self.images_vary or not _may_be_an_image(leaf) else min(1, leaf.dim())
        return dict.fromkeys(range(varying), torch.export.Dim.AUTO)

    def run(self, export: Callable[[], torch.export.ExportedProgram]) -> torch.export.ExportedProgram:
        """Export; raises UnwieldySizeError for a long size where another attempt can avoid it."""
        if not self.images_vary or not any(map(_may_be_an_image, self.inputs.tensors())):
            return export()
        with _LongSizesRefused():
            return export()


def attempts(inputs: Inputs) -> Iterator[Attempt]:
    """How to trace, the most general attempt first. A batch of one is doubled: torch takes size one for a constant."""
    doubled = inputs.with_doubled_batch()
    examples = [inputs] if doubled is None else [doubled, inputs]
    yield from (Attempt(example, images_vary=True) for example in examples)
    if any(map(_may_be_an_image, inputs.tensors())):
        yield from (Attempt(example, images_vary=False) for example in examples)


def _may_be_an_image(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and (tensor.is_floating_point() or tensor.dim() > 3)
