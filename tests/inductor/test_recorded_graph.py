"""Recorded graphs: replays give the same bits as Inductor's Python, from inputs that lie anywhere."""

import threading

import pytest
import torch
from torch import nn

import mxcompile
from mxcompile.inductor import recorded_graph, why_no_inductor
from mxcompile.inductor.recorded_graph import RecordedGraph
from mxcompile.kernels.cpu.recording import OperatorCall

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


class Net(nn.Module):
    """Looks up rows, multiplies them by weights, and adds to a state in place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.register_buffer("state", torch.zeros(64))

    def forward(self, ids, scale):
        x = self.table(ids) * scale
        self.state += self.down(torch.relu(self.up(x))).sum(0)
        return self.state.sin(), x


@pytest.fixture(scope="module")
def graphs():
    """The graphs that were compiled for `net`, in the order of their first calls."""
    return []


@pytest.fixture(scope="module")
def net(graphs):
    torch.manual_seed(0)
    made = RecordedGraph.__init__

    def init(self, call):
        made(self, call)
        graphs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "__init__", init)
        example = (torch.tensor([3]), torch.ones(1, 64))
        module = mxcompile.quantize_and_compile(Net(), example, recipe="w4a8-mxint-quick")
        with torch.no_grad():
            for token in range(4):  # some versions of torch make a graph of its own for the first call
                run(module, token)
        yield module


def replays(graphs):
    return sum(len(graph._replays) for graph in graphs)


def run(module, token, scale=1.0):
    """Outputs and state from a state of zeros. The inputs are new tensors."""
    module.state.zero_()
    sine, x = module(torch.tensor([token]), torch.full((1, 64), scale))
    return sine, x, module.state.clone()


def plain(module, graphs, *args):
    """What the graph computes without recordings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "__call__", lambda self, inputs: self.call(inputs))
        return run(module, *args)


def test_a_replay_has_the_bits_of_the_graph(net, graphs):
    assert graphs[-1].refusal is None
    assert replays(graphs) >= 1
    with torch.no_grad():
        for token, scale in ((2, 1.0), (5, 0.5), (15, -3.0)):
            expected = plain(net, graphs, token, scale)
            for actual, value in zip(run(net, token, scale), expected, strict=True):
                assert torch.equal(actual, value)


def test_outputs_are_new_tensors(net):
    with torch.no_grad():
        first = run(net, 2)
        kept = [value.clone() for value in first]
        run(net, 9)
    for actual, value in zip(first, kept, strict=True):
        assert torch.equal(actual, value)


def test_weights_that_change_or_move_are_seen(net, graphs):
    with torch.no_grad():
        net.up.bias += 1
        before = net.table.weight.data
        net.table.weight.data = before * 2
        expected = plain(net, graphs, 4)
        for actual, value in zip(run(net, 4), expected, strict=True):
            assert torch.equal(actual, value)
        net.table.weight.data = before
        net.up.bias -= 1


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="kernels are compiled without checks of indices")
def test_an_exception_of_a_kernel_is_that_of_the_graph(net, graphs):
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="index out of bounds"):
            run(net, 99)
        expected = plain(net, graphs, 1)
        assert torch.equal(run(net, 1)[0], expected[0])


def test_threads_do_not_share_buffers(net):
    """The second of two calls at once runs without the recording, whose buffers the first uses."""
    with torch.no_grad():
        expected = [net.table(torch.tensor([token])) for token in (1, 2)]
        wrong = []

        def work(token, value):
            with torch.no_grad():
                for _ in range(50):
                    if not torch.equal(net(torch.tensor([token]), torch.ones(1, 64))[1], value):
                        wrong.append(token)

        threads = [threading.Thread(target=work, args=pair) for pair in zip((1, 2), expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_many_tokens_are_not_recorded(net, graphs):
    with torch.no_grad():
        for _ in range(3):
            net(torch.arange(6), torch.ones(6, 64))
    assert graphs[-1].refusal == "it has more than 4 tokens"


class FloatHead(nn.Module):
    """A quantized linear between two in float, whose results a kernel reads and the graph returns."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.middle = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 512, bias=bias)

    def forward(self, x):
        hidden = self.middle(torch.relu(self.first(x))).sin()
        return hidden, self.head(hidden)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmuls_of_float_weights_are_recorded(bias, dtype, monkeypatch):
    made = []
    init = RecordedGraph.__init__
    monkeypatch.setattr(RecordedGraph, "__init__", lambda self, call: (init(self, call), made.append(self))[0])
    torch.manual_seed(0)
    example = (torch.randn(1, 64, dtype=dtype),)
    module = mxcompile.quantize_and_compile(
        FloatHead(bias).to(dtype), example, recipe="w4a8-mxint-quick", exclude=["first", "head"]
    )
    with torch.no_grad():
        for _ in range(4):
            module(*example)
        assert [graph.refusal for graph in made] == [None]
        assert replays(made) == 1
        kept = [(value, value.clone()) for value in module(*example)]
        for number in range(3):
            if number == 2:  # a weight that moves
                module.head.weight.data = module.head.weight.data * 2
            x = (torch.randn(1, 64, dtype=dtype),)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RecordedGraph, "__call__", lambda self, inputs: self.call(inputs))
                expected = module(*x)
            for actual, value in zip(module(*x), expected, strict=True):
                assert torch.equal(actual, value)
        assert all(torch.equal(value, copy) for value, copy in kept)
    assert made[0].refusal is None
    assert any(isinstance(part, OperatorCall) for part in made[0]._replays[0]._recording._parts)


def test_other_operators_are_not_recorded():
    calls = []
    graph = RecordedGraph(globals_of({"torch": torch}, "def call(inputs):\n return (torch.sort(inputs[0])[0],)"))
    with torch.no_grad():
        for _ in range(3):
            calls.append(graph([torch.tensor([2.0, 1.0])])[0])
    assert graph.refusal == "it calls aten.sort.default"
    assert all(value.tolist() == [1.0, 2.0] for value in calls)


def test_a_graph_of_a_gpu_without_inputs_there_is_not_recorded():
    """A mask is one. What its module calls of torch itself is no kernel, and has no address."""
    namespace = {"get_raw_stream": torch._C.get_num_threads}
    exec("def call(inputs):\n    return [*inputs, get_raw_stream()]", namespace)
    graph = RecordedGraph(namespace["call"])
    results = [graph([torch.ones(1)])[-1] for _ in range(3)]
    assert results == [torch.get_num_threads()] * 3  # of a GPU, a stream that kernels are launched on
    assert graph.refusal == "it calls get_num_threads, as a graph of a GPU does"


def test_floats_are_not_recorded():
    graph = RecordedGraph(globals_of({}, "def call(inputs):\n return (inputs[1],)"))
    with torch.no_grad():
        assert [graph([torch.ones(1), 0.5]) for _ in range(3)] == [(0.5,)] * 3
    assert graph.refusal == "it takes a float"


def test_gradients_are_those_of_the_graph(net, graphs):
    """What a graph saves for its gradients are outputs, which no later run writes to."""

    def gradients(runs):
        scale = [torch.full((1, 64), 1.0 + token, requires_grad=True) for token in range(runs)]
        losses = []
        for token in range(runs):
            net.state = torch.zeros(64)
            losses.append(net(torch.tensor([token]), scale[token])[0].sum())
        return torch.autograd.grad(sum(losses), scale)

    actual = gradients(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "__call__", lambda self, inputs: self.call(inputs))
        expected = gradients(4)
    net.state = torch.zeros(64)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert expected[3].any()


def globals_of(names, source):
    """A function with globals of its own, as a generated module has."""
    exec(source, names)
    return names["call"]


def test_without_a_library_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(recorded_graph.recording, "why_not", lambda: "no compiler")
    assert RecordedGraph(lambda inputs: inputs).refusal == "no compiler"
