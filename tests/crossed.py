"""Cross products of parameters: what differs from the first of each in one place is fast; slow tests add combinations
until every pair of values is in one.

One format in every dtype and one dtype for every format find nearly all that the whole product finds, and pairs nearly
all of the rest.
"""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def varied(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The fast ones of `crossed` alone, for parameters that do nothing together."""
    return [parameter.values for parameter in crossed(*axes) if not parameter.marks]


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: of two axes, all combinations; of more, enough for all pairs."""
    lists = [list(axis) for axis in axes]
    indices = list(product(*(range(len(values)) for values in lists)))
    chosen, pairs = set[tuple[int, ...]](), set[Any]()
    for index in sorted(indices, key=lambda index: (not _is_fast(index), index.count(0))):
        new = set(combinations(enumerate(index), 2)) - pairs
        if new or _is_fast(index):
            chosen.add(index)
            pairs |= new
    return [
        pytest.param(
            *(values[i] for values, i in zip(lists, index, strict=True)),
            marks=[] if _is_fast(index) else [pytest.mark.slow],
        )
        for index in indices
        if index in chosen
    ]


def _is_fast(index: tuple[int, ...]) -> bool:
    return len(index) - index.count(0) <= 1
