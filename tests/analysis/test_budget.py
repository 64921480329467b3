"""choose_under_budget: the least cost that fits, exact with scipy, close to it without."""

import itertools

import pytest
import torch

from mxcompile.analysis import budget
from mxcompile.analysis.budget import BudgetChoice, Limit, choose_under_budget
from mxcompile.errors import PassError


def choose(costs: torch.Tensor, sizes: torch.Tensor, most: float) -> BudgetChoice:
    return choose_under_budget(costs, [Limit(sizes, most)])


@pytest.fixture(params=["scipy", "without scipy"])
def solver(request, monkeypatch):
    """The name of the solver that is used."""
    if request.param == "scipy":
        pytest.importorskip("scipy")
        return request.param

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(budget.importlib, "import_module", missing)
    return request.param


def problem(items: int, options: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(items, options, generator=generator, dtype=torch.float64).cumsum(-1)
    costs = torch.rand(items, 1, generator=generator, dtype=torch.float64).square() * torch.exp(-2 * sizes)
    return costs, sizes


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_that_fits_costs_less(solver, seed):
    costs, sizes = problem(6, 3, seed)
    limit = float(sizes.amin(-1).sum() + sizes.amax(-1).sum()) / 2
    choice = choose(costs, sizes, limit)
    every = [
        (sum(costs[i, o].item() for i, o in enumerate(options)), sum(sizes[i, o].item() for i, o in enumerate(options)))
        for options in itertools.product(range(3), repeat=6)
    ]
    best = min(cost for cost, size in every if size <= limit)
    assert choice.sizes[0] <= limit
    assert choice.cost == pytest.approx(sum(costs[i, o].item() for i, o in enumerate(choice.options)), rel=1e-12)
    assert choice.cost <= best * (1.001 if solver == "scipy" else 1.25)


def test_with_many_items_the_bisection_is_within_one_percent(monkeypatch):
    pytest.importorskip("scipy")
    costs, sizes = problem(200, 4)
    limit = float(sizes.amin(-1).sum() + sizes.amax(-1).sum()) / 2
    exact = choose(costs, sizes, limit)
    monkeypatch.setattr(budget, "_milp", lambda *arguments: None)
    near = choose(costs, sizes, limit)
    assert exact.solver == "scipy.optimize.milp"
    assert near.solver.startswith("bisection")
    assert exact.cost <= near.cost <= 1.01 * exact.cost


def test_the_solver_is_named_and_says_what_to_install(solver):
    costs, sizes = problem(4, 2)
    text = choose(costs, sizes, float(sizes.amin(-1).sum()) * 1.1).solver
    if solver == "scipy":
        assert text == "scipy.optimize.milp"
    else:
        assert text == "bisection (scipy, which finds the optimum, is not installed: pip install mxcompile[search])"


def test_a_budget_for_everything_has_no_price(solver):
    costs, sizes = problem(5, 3)
    choice = choose(costs, sizes, float(sizes.amax(-1).sum()))
    assert choice.options == tuple(costs.argmin(-1).tolist())
    assert choice.prices[0] == 0.0


def test_a_budget_for_the_smallest_alone_takes_the_smallest(solver):
    costs, sizes = problem(5, 3)
    choice = choose(costs, sizes, float(sizes.amin(-1).sum()))
    assert choice.options == (0,) * 5
    assert choice.prices[0] > 0


def test_an_option_that_costs_as_much_and_is_larger_is_not_taken(solver):
    costs = torch.tensor([[0.5, 0.5], [0.5, 0.1]], dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    assert choose(costs, sizes, 4.0).options == (0, 1)


def test_costs_of_zero_take_the_smallest(solver):
    costs, sizes = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float64)
    assert choose(costs, sizes, 3.0).options == (0, 0, 0)


def test_two_limits_hold_and_no_other_choice_costs_less(solver):
    costs, sizes = problem(6, 3, seed=7)
    times = problem(6, 3, seed=8)[1]
    limits = [Limit(each, float(each.amin(-1).sum() + each.amax(-1).sum()) / 2) for each in (sizes, times)]
    choice = choose_under_budget(costs, limits)
    assert all(size <= limit.most for size, limit in zip(choice.sizes, limits, strict=True))
    every = [torch.tensor(options) for options in itertools.product(range(3), repeat=6)]
    fitting = [options for options in every if all(limit.holds(options) for limit in limits)]
    best = min(float(costs.gather(1, options[:, None]).sum()) for options in fitting)
    assert choice.cost <= best * (1.001 if solver == "scipy" else 1.5)


def test_limits_that_are_at_odds_are_refused(solver):
    costs = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    with pytest.raises(PassError, match="no choice of formats is within both budgets"):
        choose_under_budget(costs, [Limit(sizes, 1.0), Limit(sizes.flip(-1), 1.0)])
