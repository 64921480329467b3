"""What a study's cells say together: a table, the Pareto front of bytes and KL, and paired differences.

Cells are compared where they have scored the same model on the same windows: KL is from that model in float. A paired
difference is that of two cells' KL, window by window: its mean, and the standard error of the mean over windows, which
is much smaller than that of either KL, as windows differ more than cells do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxcompile.diagnostics.tables import table

Record = dict[str, Any]
_AXES = ("recipe", "weight", "activation", "calibration")
_CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Difference:
    """Mean KL of a cell minus that of the best one, over windows, and its standard error (None for one window)."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, record: Record, best: Record) -> Self | None:
        """Of two records; None of the best one itself."""
        if record is best:
            return None
        differences = [own - other for own, other in zip(_by_window(record), _by_window(best), strict=True)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        return cls(mean(differences), error)

    @property
    def is_clear(self) -> bool:
        """Whether it exceeds two standard errors."""
        return self.error is not None and abs(self.mean) > _CLEAR * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.5f}" + ("" if self.error is None else f" ± {self.error:.5f}")


@dataclass(frozen=True)
class Group:
    """The cells of one model and text, in order."""

    model: str
    evaluation: str
    records: tuple[Record, ...]

    @property
    def best(self) -> Record:
        """The cell with the least KL."""
        return min(self.records, key=lambda record: record["kl"])

    @property
    def front(self) -> list[Record]:
        """The cells that no other one beats in bytes and KL at once, from the smallest model up."""
        front: list[Record] = []
        for record in sorted(self.records, key=lambda record: (record["bytes"], record["kl"])):
            if not front or record["kl"] < front[-1]["kl"]:
                front.append(record)
        return front

    def to_table(self) -> Table:
        """A row for every cell; axes on which all cells agree are left out."""
        varying = [axis for axis in _AXES if len({record[axis] for record in self.records}) > 1]
        shown = varying or ["recipe"]
        front, best = self.front, self.best
        rows = [
            (*(str(record[axis] or "") for axis in shown), *_numbers(record, best, front)) for record in self.records
        ]
        first = self.records[0]
        title = f"{self.model} on {self.evaluation}: float perplexity {math.exp(first['reference_nll']):.3f}"
        numbers = ("MB", "perplexity", "KL", "top-1", "KL - best", "front")
        return table(shown, numbers, rows, title)


def groups(records: Sequence[Record]) -> list[Group]:
    """Cells that can be compared, in order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["model"], record["evaluation"]), []).append(record)
    return [Group(*key, tuple(each)) for key, each in found.items()]


def print_study(console: Console, records: Sequence[Record]) -> None:
    """Print the table of every group and its front."""
    for group in groups(records):
        console.print(group.to_table())
        names = [f"{record['bytes'] / 1e6:.1f} MB {label(record)}" for record in group.front]
        console.print(f"front of bytes and KL: {'; '.join(names)}", markup=False)
    console.print("KL - best: mean over windows of the difference in KL to the best cell ± its standard error;")
    console.print("~ marks a difference below two of them: the data do not tell these cells apart")


def label(record: Record) -> str:
    """A cell in a list: its recipe and formats."""
    formats = f" {record['weight']}/{record['activation']}" if record["weight"] else ""
    return f"{record['recipe']}{formats}"


def page_content(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """The data of the study's page."""
    return {
        "name": name,
        "groups": [
            {
                "title": f"{group.model} on {group.evaluation}",
                "float": math.exp(group.records[0]["reference_nll"]),
                "cells": [_cell(record, group) for record in group.records],
            }
            for group in groups(records)
        ],
    }


def _cell(record: Record, group: Group) -> dict[str, Any]:
    difference = Difference.of(record, group.best)
    numbers = {key: record[key] for key in ("bytes", "kl", "perplexity", "top1")}
    return numbers | {
        "label": label(record),
        "calibration": record["calibration"] or "",
        "front": any(record is each for each in group.front),
        "difference": "best" if difference is None else str(difference),
        "clear": difference is None or difference.is_clear,
    }


def _by_window(record: Record) -> list[float]:
    """Mean KL of each window."""
    return [kl / tokens for tokens, _, kl, _, _ in record["windows"]]


def _numbers(record: Record, best: Record, front: Sequence[Record]) -> list[str | Text]:
    difference = Difference.of(record, best)
    told_apart = difference is None or difference.is_clear
    return [
        f"{record['bytes'] / 1e6:.1f}",
        f"{record['perplexity']:.3f}",
        f"{record['kl']:.4f}",
        f"{record['top1']:.1%}",
        "best" if difference is None else f"{'' if told_apart else '~'}{difference}",
        Text("*", style="green") if any(record is each for each in front) else "",
    ]
