"""The values of one tensor of the result, and of the next ones at the same time.

Rounding is that of `round-weights` and `lower-mx`, some rows at a time: beside a weight only its packed bytes exist.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxcompile.checkpoint.pending_values import Values
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.errors import WeightError
from mxcompile.formats import parse_format
from mxcompile.model_free.plan import FilesPlan
from mxcompile.numerics.exact_packing import pack_exactly
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.row_slices import all_finite, row_wise
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.pinned_copies import PinnedCopies
from mxcompile.tensor.weight import MXLayout, MXWeight


@dataclass(frozen=True)
class TensorRounding:
    """Makes the tensors of a plan. device: where weights are rounded, and stay until they are written."""

    plan: FilesPlan
    device: torch.device
    layouts: dict[str, MXLayout] = field(init=False, default_factory=dict[str, MXLayout])
    _own: threading.local = field(init=False, default_factory=threading.local)

    def __post_init__(self) -> None:
        for name, value in named_tensors(self.plan.module).items():
            if isinstance(value, MXWeight):
                self.layouts[name] = value.layout_

    def make(self, name: str) -> Tensor:
        """A tensor as the plan's module has it: as it is in the files, or an MX weight.

        Raises WeightError if a weight holds NaN or Inf, CheckpointError if it cannot be read.
        """
        source, layout = self.plan.source, self.layouts.get(name)
        if layout is None:
            return source.tensor(name)
        stored = source.packed(name)
        if stored is not None and (stored.layout_.format, stored.layout_.transposed) == (
            layout.format,
            layout.transposed,
        ):
            return MXWeight(stored.elements, stored.scales, layout, source.dtype(name))
        return self._rounded(source, name, layout)

    def _rounded(self, source: SourceFiles, name: str, layout: MXLayout) -> MXWeight:
        weight = self._on_device(source.tensor(name))
        if not all_finite(weight):
            raise WeightError(
                f"{source.file(name)}: {name} holds NaN or Inf values and cannot be quantized: repair the checkpoint, "
                "or keep the layer in float with exclude"
            )
        rows = weight.transpose(-1, -2) if layout.transposed else weight
        fmt, rule = parse_format(layout.format), self.plan.rules.get(name, self.plan.rule)

        def round_and_pack(part: Tensor) -> tuple[Tensor, Tensor]:
            values, scales = round_rows(part, fmt, rule)
            return pack_exactly(values, scales, fmt), scales

        elements, scales = row_wise(round_and_pack, rows)
        return MXWeight(elements, scales, layout, weight.dtype)

    def _on_device(self, value: Tensor) -> Tensor:
        """A copy on the device; on a GPU by buffers of the thread's own, as copies of ordinary memory wait in turn."""
        if self.device.type != "cuda":
            return value.to(self.device)
        if not hasattr(self._own, "copies"):
            self._own.copies = PinnedCopies(self.device)
        return self._own.copies.to_device(value.contiguous())


class LookAhead:
    """Makes up to `workers` tensors at the same time, each in a thread, in the order in which they will be asked for.

    One that is made waits until it is taken: no more than `workers` of them, waiting or in work, are in memory.
    """

    def __init__(self, make: Callable[[str], Tensor], workers: int) -> None:
        self._make, self._workers = make, workers
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def __enter__(self) -> Values:
        return self._begin

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, names: Sequence[str]) -> Callable[[str], Tensor]:
        if self._pool is None:
            return self._make
        pool, waiting, started = self._pool, list(reversed(names)), dict[str, Future[Tensor]]()

        def take(name: str) -> Tensor:
            while waiting and len(started) < self._workers:
                ahead = waiting.pop()
                started[ahead] = pool.submit(self._make, ahead)
            future = started.pop(name, None)
            return self._make(name) if future is None else future.result()

        return take
