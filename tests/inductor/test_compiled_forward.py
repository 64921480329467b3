"""A module's forward under Dynamo: what is left out while it traces, and for how many kinds of calls it compiles."""

import gc
import logging

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import side_effects
from torch.fx import traceback as fx_traceback

from mxcompile.inductor import compiled_forward
from mxcompile.inductor.compiled_forward import CompiledForward, call_sites_recorded


class AddsOne(torch.nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize(
    ("policy", "logged", "expected"),
    [
        ("info", False, "silent"),
        ("info", True, "info"),
        ("warn", False, "warn"),
    ],
)
def test_texts_about_side_effects_are_written_only_for_who_asked(monkeypatch, policy, logged, expected):
    policies: list[str] = []

    def looking(graph, _):
        policies.append(dynamo_config.side_effect_replay_policy)
        return graph.forward

    log = side_effects.side_effects_log
    monkeypatch.setattr(log, "level", logging.DEBUG if logged else logging.WARNING)
    log.manager._clear_cache()
    with dynamo_config.patch(side_effect_replay_policy=policy):
        CompiledForward(AddsOne(), looking)(torch.ones(3))
        assert policies == [expected]
        assert dynamo_config.side_effect_replay_policy == policy


def test_no_garbage_is_collected_while_a_graph_is_traced():
    enabled: list[bool] = []
    after = dynamo_config.run_gc_after_compile

    def looking(graph, _):
        enabled.extend((gc.isenabled(), dynamo_config.run_gc_after_compile))
        return graph.forward

    forward = CompiledForward(AddsOne(), looking)
    assert torch.equal(forward(torch.ones(3)), torch.full((3,), 2.0))
    assert enabled == [False, False]
    assert (gc.isenabled(), dynamo_config.run_gc_after_compile) == (True, after)


def test_lines_of_python_are_not_recorded_while_a_graph_is_traced():
    """Dynamo would name this file in each node; what compiles the graph finds torch's state as it is without us."""
    traces: list[str | None] = []

    def state():
        return fx_traceback.has_preserved_node_meta(), fx_traceback.get_current_meta().get("stack_trace")

    def looking(graph, _):
        traces.extend(node.stack_trace for node in graph.graph.nodes if node.op == "call_function")
        with call_sites_recorded():
            assert state() == (False, None)
        return graph.forward

    assert torch.equal(CompiledForward(AddsOne(), looking)(torch.ones(3)), torch.full((3,), 2.0))
    assert [str(trace).strip() for trace in traces] == ["lines of Python are not recorded while a module is traced"]
    assert state() == (False, None)


def call_of_each_kind(kinds):
    """A compiled module's results for tensors of 1, 2, ... dimensions, and how many graphs were compiled for them."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    forward = CompiledForward(AddsOne(), backend)
    for _ in range(2):
        for kind in range(kinds):
            assert torch.equal(forward(torch.ones([2] * (kind + 1))), torch.full([2] * (kind + 1), 2.0))
    return len(graphs)


def test_a_forward_is_compiled_for_more_kinds_of_calls_than_by_default():
    """Caches, and batches of one and of more, are such kinds: with three caches there are more than eight."""
    default = dynamo_config.recompile_limit
    assert call_of_each_kind(default + 4) == default + 4
    assert dynamo_config.recompile_limit == default


def test_when_no_further_kinds_are_compiled_one_line_says_so(monkeypatch):
    monkeypatch.setattr(compiled_forward, "_MOST_GRAPHS", 10)
    with pytest.warns(
        UserWarning, match="this AddsOne has been compiled for 10 kinds of calls .* run uncompiled"
    ) as said:
        assert call_of_each_kind(12) == 10
    assert len(said) == 1
    assert said[0].filename == __file__
