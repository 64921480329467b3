"""One option for each item, with the least cost under a budget: a multiple-choice knapsack.

`scipy.optimize.milp` (HiGHS) finds the optimum. Without scipy (`pip install mxcompile[search]`), a bisection on the
price of the budget comes close: each item takes the option with the least cost + price * size, and the rest is spent
where it saves most.
"""

import importlib
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxcompile.errors import PassError

_STEPS, _HIGHEST, _GAP, _NODES = 60, 1e300, 1e-4, 20_000
_MILP = "scipy.optimize.milp"
_GAVE_UP = "bisection (scipy.optimize.milp gave up)"
_WITHOUT_SCIPY = "bisection (scipy, which finds the optimum, is not installed: pip install mxcompile[search])"


@dataclass(frozen=True)
class Limit:
    """The sizes `[items, options]` of the chosen options, float64 and not negative, add up to at most `most`."""

    sizes: Tensor
    most: float

    def holds(self, options: Tensor) -> bool:
        """Whether options `[items]` are within the limit."""
        return _sum(self.sizes, options) <= self.most


@dataclass(frozen=True)
class BudgetChoice:
    """options: the index of each item's option. cost: their sum. sizes: theirs under each limit.

    prices: for each limit, what one more unit of it would save in costs. solver: how the choice was made, in words.
    """

    options: tuple[int, ...]
    cost: float
    sizes: tuple[float, ...]
    prices: tuple[float, ...]
    solver: str


def choose_under_budget(costs: Tensor, limits: Sequence[Limit]) -> BudgetChoice:
    """The options with the least cost within all limits; costs: `[items, options]`, float64, finite.

    Raises PassError if there are none: one limit can be kept if its smallest options can, several may be at odds.
    """
    options, prices = _relaxed(costs, limits, limits[0].sizes)
    if all(limit.holds(options) for limit in limits):
        options = _filled(options, costs, limits)
    scipy = _scipy()
    exact = None if scipy is None else _milp(scipy, costs, limits)
    solver = _WITHOUT_SCIPY if scipy is None else _GAVE_UP if exact is None else _MILP
    fitting = [each for each in (exact, options) if each is not None and all(limit.holds(each) for limit in limits)]
    if not fitting:
        raise PassError("no choice of formats is within both budgets: raise one of them, or list smaller formats")
    best = min(fitting, key=lambda each: _sum(costs, each))  # the solver stops at a gap
    sizes = tuple(_sum(limit.sizes, best) for limit in limits)
    return BudgetChoice(tuple(best.tolist()), _sum(costs, best), sizes, prices, solver)


def _scipy() -> Any:
    """scipy.optimize, None if it is not installed."""
    try:
        return importlib.import_module("scipy.optimize")
    except ImportError:
        return None


def _relaxed(costs: Tensor, limits: Sequence[Limit], ties: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """The options `[items]` with the least cost + prices * sizes, and the least prices that keep the limits.

    ties: of equal options, the one with the least of these.
    """
    if not limits:
        equal = costs == costs.amin(-1, keepdim=True)
        return torch.where(equal, ties, torch.inf).argmin(-1), ()
    first, *others = limits

    def at(price: float) -> tuple[Tensor, tuple[float, ...]]:
        return _relaxed(costs + price * first.sizes, others, ties)

    options, prices = at(0.0)
    if first.holds(options):
        return options, (0.0, *prices)
    low, high = 0.0, float(costs.max() - costs.min()) / max(float(first.sizes.max()), 1e-30) or 1e-30
    while not first.holds(at(high)[0]) and high < _HIGHEST:
        low, high = high, high * 4
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if first.holds(at(middle)[0]) else (middle, high)
    options, prices = at(high)
    if not first.holds(options) and not others:  # costs beyond any price: the smallest options
        options = first.sizes.argmin(-1)
    return options, (high, *prices)


def _filled(options: Tensor, costs: Tensor, limits: Sequence[Limit]) -> Tensor:
    """The options after spending the rest of the limits, each time on what saves most for its size."""
    options = options.clone()
    while True:
        saved = costs.gather(1, options[:, None]) - costs
        fits, share = saved > 0, torch.full_like(costs, 1e-30)
        for limit in limits:
            more = limit.sizes - limit.sizes.gather(1, options[:, None])
            rest = limit.most - _sum(limit.sizes, options)
            fits &= more <= rest
            share = torch.maximum(share, more / max(limit.most, 1e-30))
        if not fits.any():
            return options
        item, option = divmod(int(torch.where(fits, saved / share, -torch.inf).argmax()), costs.shape[1])
        options[item] = option


def _milp(scipy: Any, costs: Tensor, limits: Sequence[Limit]) -> Tensor | None:
    """The optimal options `[items]`; None if the solver gives up."""
    items, options = costs.shape
    sparse: Any = importlib.import_module("scipy.sparse")
    one_each = sparse.kron(sparse.eye_array(items), torch.ones(1, options, dtype=torch.float64).numpy(), format="csr")
    rows = [scipy.LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        sizes = limit.sizes.reshape(1, -1).numpy() / max(limit.most, 1e-30)
        rows.append(scipy.LinearConstraint(sizes, -float("inf"), 1.0))
    scaled = (costs / costs.abs().max().clamp(min=1e-300)).flatten().numpy()
    settings = {"mip_rel_gap": _GAP, "node_limit": _NODES}
    bounds = scipy.Bounds(0, 1)
    with _stdout_to_stderr():
        found = scipy.milp(scaled, integrality=scaled * 0 + 1, bounds=bounds, constraints=rows, options=settings)
    return None if found.x is None else torch.from_numpy(found.x).view(items, options).argmax(-1)


@contextmanager
def _stdout_to_stderr() -> Generator[None]:
    """Send what C++ code prints to stderr: remarks of the solver would be in the middle of a command's JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _sum(values: Tensor, options: Tensor) -> float:
    return float(values.gather(1, options[:, None]).sum())
