"""Budgets of formats as limits of a choice: stored bits a weight, bytes, microseconds of matmuls."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import Node

from mxcompile.analysis.budget import Limit
from mxcompile.analysis.format_items import FormatItem, FormatItems
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Miss
from mxcompile.kernels.measured_times import TimesTable, times_of, times_on


class Latency(Enum):
    """What a time is measured for: one token at a time, or the 2048 tokens of a prompt."""

    DECODE = "decode"
    PREFILL = "prefill"

    @property
    def tokens(self) -> int:
        """Rows of each matmul's input."""
        return 1 if self is Latency.DECODE else 2048


@dataclass(frozen=True)
class Budgets:
    """bits, bytes: of weights, one of them or none. microseconds: of all matmuls at `latency`, none without it.

    gpu: the table of times to use, None: that of the GPU where the program is.
    """

    bits: float | None
    bytes: int | None
    microseconds: float | None
    latency: Latency | None
    gpu: str | None

    def limits(self, program: Program, items: FormatItems, formats: Sequence[MXFormat | None]) -> list[Limit]:
        """What the free items may take beside the fixed ones, in bytes and in microseconds.

        Raises PassError, which says what is needed, if their smallest formats take more.
        """
        limits: list[Limit] = []
        if self.bits is not None or self.bytes is not None:
            sizes = [[float(item.stored_bytes(fmt)) for fmt in formats] for item in items.free]
            total = self.bytes if self.bits is None else self.bits * items.values / 8
            assert total is not None
            limits.append(self._limit(sizes, len(formats), total, items.fixed_bytes, items.values))
        if self.microseconds is not None:
            table = self._table(program)
            times = [[self._time(table, item, fmt) for fmt in formats] for item in items.free]
            fixed = sum(self._time(table, item, fmt) for item, fmt in items.fixed)
            limits.append(self._limit(times, len(formats), self.microseconds, fixed, None))
        return limits

    @property
    def text(self) -> str:
        """In words: `4.5 bits a weight and 900 us of matmuls (decode)`."""
        stored = (
            f"{self.bits:g} bits a weight" if self.bits is not None else f"{self.bytes} bytes" if self.bytes else ""
        )
        time = "" if self.microseconds is None else f"{self.microseconds:g} us of matmuls ({self._latency.value})"
        return " and ".join(filter(None, (stored, time)))

    @property
    def unit(self) -> str:
        """What the price of the first limit is for."""
        return "microsecond" if self.bits is None and self.bytes is None else "bit"

    def misses(self, items: FormatItems) -> list[Miss]:
        """The items whose time is not counted."""
        if self.microseconds is None:
            return []
        untimed = [item for item in (*items.free, *(item for item, _ in items.fixed)) if not _products(item)]
        return [
            Miss(where(item.matmuls[0].node), "no time of experts was measured: it counts none") for item in untimed
        ]

    def microseconds_of(self, program: Program, chosen: Sequence[tuple[FormatItem, MXFormat | None]]) -> float | None:
        """The time of items in the formats given, None without a budget of time."""
        if self.microseconds is None:
            return None
        table = self._table(program)
        return sum(self._time(table, item, fmt) for item, fmt in chosen)

    @property
    def _latency(self) -> Latency:
        assert self.latency is not None
        return self.latency

    def _table(self, program: Program) -> TimesTable:
        if self.gpu is not None:
            return times_of(self.gpu)
        return times_on(next(iter(map(program.device, program.parameter_names()))))

    def _time(self, table: TimesTable, item: FormatItem, fmt: MXFormat | None) -> float:
        """Microseconds of an item's matmuls; those that read one value are one product."""
        tokens = self._latency.tokens
        return sum(table.microseconds(fmt, outputs, size, tokens) for outputs, size in _products(item))

    def _limit(self, sizes: list[list[float]], options: int, total: float, fixed: float, values: int | None) -> Limit:
        """values: of all weights, None for a limit in microseconds."""
        table = torch.tensor(sizes, dtype=torch.float64).view(-1, options)
        least = fixed + float(table.amin(-1).sum())
        if least > total:
            if values is None:
                given, needed = f"microseconds={self.microseconds:g}", f"microseconds={least:.0f}"
            elif self.bits is not None:
                given, needed = f"bits={self.bits:g}", f"bits={least * 8 / values:.4g}"
            else:
                given, needed = f"bytes={self.bytes}", f"bytes={least:.0f}"
            raise PassError(
                f"allocate{{{given}}}: the weights take more in their smallest formats; give {needed} or more, or a "
                "smaller format"
            )
        return Limit(table, total - fixed)


def _products(item: FormatItem) -> list[tuple[int, int]]:
    """(outputs, inputs) of each product that is launched; none for experts, whose times were not measured."""
    outputs: dict[tuple[Node, int], int] = {}
    for matmul in item.matmuls:
        weight = matmul.root.meta["val"]
        if weight.dim() == 2:
            key = matmul.activation, matmul.in_features
            outputs[key] = outputs.get(key, 0) + weight.numel() // matmul.in_features
    return [(count, size) for (_, size), count in outputs.items()]
