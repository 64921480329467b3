"""The counters of a static cache's layers advance in one call."""

import pytest
import torch
from fused_steps import compiled

from mxcompile.inductor import why_no_inductor
from mxcompile.inductor.rewrites import join_counters

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
JOINED = torch.ops.aten._foreach_add.Scalar


def test_those_with_the_same_step_are_joined():
    def step(a, b, c, other, matrix):
        y = matrix[:1] * a
        for counter in (a, b, c):
            counter.add_(1)
        other.add_(2)
        matrix.add_(1)
        return y

    def given():
        return [*map(torch.tensor, (3, 5, 9, 4)), torch.arange(4)]

    expected, actual = given(), given()
    y, calls = compiled(step, *actual)
    assert torch.equal(y, step(*expected))
    assert calls.count(JOINED) == 1
    for one, another in zip(actual, expected, strict=True):
        assert torch.equal(one, another)


def test_one_counter_and_floats_stay():
    def step(a, b):
        a.add_(1)
        b.add_(1)

    args = torch.tensor(3), torch.tensor(2.0)
    _, calls = compiled(step, *args)
    assert JOINED not in calls
    assert (args[0].item(), args[1].item()) == (4, 3.0)


def test_a_counter_that_is_read_after_it_advanced_stays():
    def step(a, b):
        a.add_(1)
        b.add_(1)
        return a * 2, b * 2

    args = torch.tensor(3), torch.tensor(2)
    (a, b), calls = compiled(step, *args)
    assert JOINED not in calls
    assert (a.item(), b.item(), args[0].item(), args[1].item()) == (8, 6, 4, 3)


def postponed(monkeypatch, function, *args):
    """(how many counters advance at the end, names of the calls)"""
    monkeypatch.setattr(join_counters, "DEVICE", "cpu")
    results = []

    def backend(module, _):
        results.append(join_counters.postpone_counters(module.graph))
        module.graph.lint()
        module.recompile()
        results.append([getattr(node.target, "__name__", node.target) for node in module.graph.nodes])
        return module

    torch.compiler.reset()
    wanted_args = [arg.clone() for arg in args]
    given, wanted = torch.compile(function, backend=backend, fullgraph=True)(*args), function(*wanted_args)
    torch.testing.assert_close((given, args), (wanted, tuple(wanted_args)), rtol=0, atol=0)
    return results


def test_counters_advance_at_the_end(monkeypatch):
    def step(x, a, b):
        x = x * a
        a.add_(1)
        x = x * b
        b.add_(1)
        return x + 1

    count, names = postponed(monkeypatch, step, torch.ones(3), torch.tensor(3), torch.tensor(5))
    assert count == 2
    assert names[-4:] == ["add", "add_", "add_", "output"]


def test_a_counter_that_is_read_later_or_has_a_view_does_not_wait(monkeypatch):
    def step(x, a, b):
        view = b.view(1)
        a.add_(1)
        b.add_(1)
        return x * a + view

    assert postponed(monkeypatch, step, torch.ones(3), torch.tensor(3), torch.tensor(5))[0] == 0
