"""Processes that share a run compare what they have."""

import pytest
import torch
from torch import fx

from mxcompile.pipeline.together import graph_text


def graph_on(device: str) -> fx.Graph:
    graph = fx.Graph()
    positions = graph.call_function(torch.ops.aten.arange.default, (8,), {"device": torch.device(device)})
    graph.output(graph.call_function(torch.ops.aten.to.device, (positions, torch.device(device), torch.int64)))
    return graph


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_each_process_has_a_gpu_of_its_own(kind):
    texts = {graph_text(graph_on(f"{kind}:{index}")) for index in (0, 1, 10)}
    assert len(texts) == 1
    assert f"{kind}:" not in texts.pop()


def test_another_kind_of_device_is_another_graph():
    assert graph_text(graph_on("cuda:0")) != graph_text(graph_on("cpu"))
