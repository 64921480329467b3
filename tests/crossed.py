"""Cross products of parameters: what differs from the first of each in one place is fast, the rest of the product slow.

One format in every dtype and one dtype for every format find nearly all that the whole product finds.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: all combinations, those far from the first values marked slow."""
    lists = [list(axis) for axis in axes]
    first = [values[0] for values in lists]

    def differences(values: tuple[Any, ...]) -> int:
        return sum(value is not usual for value, usual in zip(values, first, strict=True))

    return [
        pytest.param(*values, marks=[pytest.mark.slow] if differences(values) > 1 else []) for values in product(*lists)
    ]
