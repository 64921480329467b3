"""Equal layers of a graph are found and compiled once, with borders after matmuls; the model computes the same."""

import copy

import pytest
import torch
from compiled_anew import graphs_compiled_anew
from models import inputs, llama, output
from torch import nn

import mxcompile
from mxcompile.inductor import backend, compile_module, recorded_graph, why_no_inductor
from mxcompile.inductor.backend import FuseMX
from mxcompile.inductor.repeated_layers import find_repetition
from mxcompile.inductor.rewrites import join_counters
from mxcompile.inductor.split_graph import compile_in_pieces
from mxcompile.numerics.metrics import sqnr_db

NO_COMPILER = why_no_inductor(torch.device("cpu"))


class Layer(nn.Module):
    """h + down(act(up(norm(h)))), with a buffer that counts the calls."""

    def __init__(self, width=16, act=torch.relu):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, width), nn.Linear(width, 16)
        self.act = act
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls.add_(1)
        return h + self.down(self.act(self.up(self.norm(h))))


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(32, 16), nn.ModuleList(layers), nn.Linear(16, 32)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def in_pieces(model, *args, dynamic=False):
    """(result, what runs in place of the graph, number of calls of each piece) without Inductor."""
    made, pieces = [], []

    def compiler(module, values):
        compiled = compile_in_pieces(module, values, lambda piece, _: pieces.append(piece) or piece)
        made.append(compiled)
        return module if compiled is None else compiled

    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(model, backend=compiler, dynamic=dynamic, fullgraph=True)(*args)
    sizes = [sum(node.op not in ("placeholder", "output") for node in piece.graph.nodes) for piece in pieces]
    return result, made[0], sizes


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_equal_layers_are_one_piece(dynamic):
    torch.manual_seed(0)
    all_sizes = []
    for count in (5, 9):
        model = Stack(*(Layer() for _ in range(count)))
        with torch.no_grad():
            expected = copy.deepcopy(model)(IDS)
        result, made, sizes = in_pieces(model, IDS, dynamic=dynamic)
        assert torch.equal(result, expected)
        assert made.repetitions == count - 1  # the first is in the head, as borders are within layers
        assert all(layer.calls == 1 for layer in model.layers)
        all_sizes.append(sizes)
    assert all_sizes[0] == all_sizes[1]
    assert dynamic or all_sizes[0] == [6, 6, 2]


def test_borders_are_right_after_the_last_matmul_of_an_input():
    pieces = []
    model = Stack(*(Layer() for _ in range(5)))

    def compiler(module, values):
        return compile_in_pieces(module, values, lambda piece, _: pieces.append(piece) or piece)

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=compiler)(IDS)
    for piece in pieces[:2]:
        *_, last, out = piece.graph.nodes
        assert "linear" in str(last.target)
        assert len(out.args[0]) == 2  # the residual and what is added to it
        assert last in out.args[0]


def test_layers_that_alternate_are_one_piece_in_pairs():
    layers = [Layer(act=act) for _ in range(5) for act in (torch.relu, torch.tanh)]
    model = Stack(*layers)
    with torch.no_grad():
        expected = copy.deepcopy(model)(IDS)
    result, made, _ = in_pieces(model, IDS)
    assert torch.equal(result, expected)
    assert made.repetitions == 4


def test_what_precedes_and_follows_the_equal_layers_stays():
    model = Stack(Layer(32), *(Layer() for _ in range(5)), Layer(48))
    with torch.no_grad():
        expected = copy.deepcopy(model)(IDS)
    result, made, _ = in_pieces(model, IDS)
    assert torch.equal(result, expected)
    assert made.repetitions == 5  # from the matmul of the layer before


def test_counters_advance_after_the_equal_layers_on_a_gpu(monkeypatch):
    class Counting(Layer):
        """Adds how often it was called before."""

        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(3))

        def forward(self, h):
            h = h + self.count
            self.count.add_(1)
            return super().forward(h)

    monkeypatch.setattr(join_counters, "DEVICE", "cpu")
    model = Stack(*(Counting() for _ in range(5)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = [other(IDS) for _ in range(2)]
    for wanted in expected:
        result, made, sizes = in_pieces(model, IDS)
        assert torch.equal(result, wanted)
        assert made.repetitions == 4
        assert sizes == [7, 7, 2 + 5]
    assert [layer.count for layer in model.layers] == [5] * 5


@pytest.mark.parametrize("widths", [(16, 16), (16, 32, 48, 64, 80)])
def test_too_few_or_unlike_layers_are_compiled_as_a_whole(widths):
    _, made, _ = in_pieces(Stack(*map(Layer, widths)), IDS)
    assert made is None


def test_layers_that_read_each_others_results_differently_are_not_equal():
    class Crossed(Stack):
        """Every layer also reads the result of the layer two before, the last the first embedding."""

        def forward(self, ids):
            h = [self.embed(ids)]
            for number, layer in enumerate(self.layers):
                h.append(layer(h[-1]) + h[0 if number == len(self.layers) - 1 else max(0, number - 2)])
            return self.head(h[-1])

    model = Crossed(*(Layer() for _ in range(7)))
    with torch.no_grad():
        expected = copy.deepcopy(model)(IDS)
    result, _, _ = in_pieces(model, IDS)
    assert torch.equal(result, expected)


def test_a_graph_of_one_kind_of_call_has_no_layers():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    for _ in range(9):
        node = graph.call_function(torch.neg, (node,))
    graph.output((node,))
    assert find_repetition(graph, lambda node: node.op == "placeholder") is None


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_a_decode_step_in_pieces_is_one_recording(monkeypatch):
    graphs = []
    made = recorded_graph.RecordedGraph.__init__
    monkeypatch.setattr(
        recorded_graph.RecordedGraph, "__init__", lambda self, call: graphs.append(self) or made(self, call)
    )
    model = mxcompile.quantize_and_compile(
        llama(4).to(torch.bfloat16), inputs("llama"), recipe="w4a8-mxint-quick", compile=False, include=["lm_head"]
    )
    compiled = compile_module(copy.deepcopy(model))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    ids = inputs("llama")["input_ids"]
    with graphs_compiled_anew():
        tokens = [compiled.generate(ids, **options) for _ in range(2)]
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] == ids.shape[1] + 8
    decode = graphs[-1]
    assert decode.refusal is None
    assert len(decode._replays) == 1


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_compilations_do_not_grow_with_the_layers(monkeypatch):
    repetitions = []

    def watched(*args):
        made = compile_in_pieces(*args)
        repetitions.append(made and made.repetitions)
        return made

    monkeypatch.setattr(backend, "compile_in_pieces", watched)
    example, fuse = inputs("llama"), FuseMX()
    monkeypatch.setattr(backend, "FuseMX", lambda: fuse)
    model = mxcompile.quantize_and_compile(llama(4), example, recipe="w4a8-mxint-quick", compile=False)
    compiled = compile_module(copy.deepcopy(model))
    with torch.no_grad(), graphs_compiled_anew():
        expected = output(model(**example))
        results = [output(compiled(**example, use_cache=False)) for _ in range(2)]
    assert torch.equal(*results)
    assert sqnr_db(expected, results[0]) > 40
    assert repetitions == [3]
    assert len(fuse.results) == 3  # head, layer, tail
    assert sum(result.rewrites for result in fuse.results) == 2 * (7 + 4)  # the first layer, and one for all others
    assert not any(result.misses for result in fuse.results)
    compiled(**example, use_cache=False)  # with gradients, the graph is compiled as a whole
    assert len(repetitions) == 1
