"""Sweep: batches run through a program segment by segment with little state; later segments see changed weights.
AlteredRun: the same program with replaced tensors and prepared inputs, without being changed.
"""

from weakref import ref

import pytest
import torch
from models import inputs, llama, output
from torch import Tensor, nn

from mxcompile.analysis.choice import choose
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import Request, Runner, gather_statistics
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.statistics.observers import ChannelAbsMax, ChannelImportance
from mxcompile.errors import InputError
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.tensor.mapped_tensors import MappedTensors


@pytest.fixture(scope="module")
def two_layers() -> Program:
    return trace(llama(2), inputs("llama"))


@pytest.fixture
def program(two_layers) -> Program:
    return two_layers.copy()


def cut(program: Program) -> tuple[Segment, ...]:
    return find_segments(program, choose(program).matmuls)


def batches(*shapes: tuple[int, int]) -> list[Inputs]:
    return [Inputs((), inputs("llama", *shape, seed=seed)) for seed, shape in enumerate(shapes)]


def held(sweep: Sweep) -> tuple[int, int]:
    """How many tensors all states hold, and their bytes."""
    tensors = [value for state in sweep.states for value in state.values() if isinstance(value, Tensor)]
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Sum:
    """The sum of all it sees: an observer that every update shows in."""

    def __init__(self) -> None:
        self.value, self.updates = torch.zeros((), dtype=torch.float64), 0

    def update(self, x: Tensor) -> None:
        self.value, self.updates = self.value + x.double().sum(), self.updates + 1


class Last:
    """The last value it sees, as it was then."""

    def update(self, x: Tensor) -> None:
        self.value = x.clone()


# Moving


def test_what_is_held_does_not_grow_with_depth(program):
    """Behind every segment but the first as much as behind the second of two layers, the last layer's not more."""
    found = []
    for deep in (program, trace(llama(6), inputs("llama"))):
        sweep = Sweep(deep, batches((2, 8), (1, 5)))
        sizes = []
        for segment in cut(deep):
            sweep.advance(segment)
            sizes.append(held(sweep))
        found.append(sizes)
    shallow, deep = found
    assert len(deep) == 3 * len(shallow)
    assert set(deep[:-3]) == {shallow[0]}
    assert deep[-3:] == shallow[-3:]
    assert deep[-1] < deep[0]  # masks and position embeddings have been read for the last time


def test_states_hold_only_what_is_still_to_be_read(program):
    sweep, passed = Sweep(program, [program.example]), set()
    for segment in cut(program):
        sweep.advance(segment)
        passed.update(segment.nodes)
        assert all(node.users.keys() - passed for node in sweep.states[0])
        assert set(segment.outputs) <= sweep.states[0].keys()


def test_ragged_batches(program):
    """Batches of different sizes go through side by side: each comes out as it does alone."""
    given = batches((2, 8), (1, 5), (3, 11))
    sweep = Sweep(program, given)
    rest = [node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    for segment in cut(program):
        sweep.advance(segment)
        rest = rest[len(segment.nodes) :]
    for state, batch in zip(sweep.states, given, strict=True):
        logits = Runner(program).run_nodes(rest, state, None, rest[-1:])[rest[-1]]
        assert torch.equal(logits, output(program(**batch.kwargs)))


def test_a_batch_of_another_kind_is_refused(program):
    with pytest.raises(InputError, match="a calibration batch has 0 positional arguments and keywords"):
        Sweep(program, [Inputs((), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})])


def test_later_segments_see_a_replaced_weight(program):
    """As if the weight had been replaced from the start; earlier values stay as they were."""
    before = program.copy()
    first, second, *_ = cut(program)
    sweep = Sweep(program, [program.example])
    sweep.advance(first)
    name = second.matmuls[-1].parameter
    program.set_tensor(name, program.tensor(name).detach() * 3)
    sweep.advance(second)
    stream = second.outputs[-1]
    for weights, same in ((program, True), (before, False)):
        nodes = {node.name: node for node in weights.graph.nodes}
        run = [nodes[node.name] for node in (*first.nodes, *second.nodes)]
        whole = Runner(weights).run_nodes(run, bind_inputs(weights, weights.example), None, [nodes[stream.name]])
        assert torch.equal(sweep.states[0][stream], whole[nodes[stream.name]]) == same


# Looking


def test_observers_see_what_gather_sees(program):
    given, segments = batches((2, 8), (1, 5)), cut(program)
    values = [value for segment in segments for value in segment.inputs]
    gather_statistics(
        program, [Request(value.name, kind) for value in values for kind in (ChannelAbsMax, ChannelImportance)], given
    )
    sweep = Sweep(program, given)
    for segment in segments:
        observers = {value: [ChannelAbsMax(), ChannelImportance()] for value in segment.inputs}
        sweep.advance(segment, observers)
        for value, kinds in observers.items():
            for kind in kinds:
                assert torch.equal(kind.value, program.statistics[value.name, type(kind).__name__])


def test_looking_stays_in_front(program):
    """Observing and asking for values, of the segment or carried to it, moves nothing and can be repeated."""
    first, second, *_ = cut(program)
    sweep = Sweep(program, batches((2, 8), (1, 5)))
    sweep.advance(first)
    before = [dict(state) for state in sweep.states]
    (stream, *_), (inside, *_) = first.outputs[-1:], second.inputs
    seen = [Sum(), Sum()]
    for observer in seen:
        sweep.observe(second, {inside: [observer], stream: [observer]})
    found = list(sweep.values(second, [inside, stream]))
    assert [observer.updates for observer in seen] == [4, 4]
    assert seen[0].value == seen[1].value == sum(v.double().sum() for values in found for v in values.values())
    assert [set(values) for values in found] == [{inside, stream}] * 2
    assert all(state == kept for state, kept in zip(sweep.states, before, strict=True))


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["too much to hold", "held"])
def test_approaching_changes_no_value(program, limit):
    """Values asked for on the way, and those behind the segments, are what they are without; limit 0 moves nothing."""
    plain, near = (Sweep(program, batches((2, 8), (1, 5))) for _ in range(2))
    for segment in cut(program):
        for value in segment.inputs:
            before = list(near.states)
            near.approach(segment, value, limit)
            assert all((value in state) == (limit > 0) for state in near.states)
            assert limit or all(a is b for a, b in zip(before, near.states, strict=True))
            found = zip(plain.values(segment, [value]), near.values(segment, [value]), strict=True)
            assert all(torch.equal(one[value], other[value]) for one, other in found)
        plain.advance(segment)
        near.advance(segment)
        for one, other in zip(plain.states, near.states, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(v, other[node]) for node, v in one.items() if isinstance(v, Tensor))


@pytest.mark.parametrize(("device", "near"), [("cpu", True), ("meta", False)], ids=["CPU", "as a GPU"])
def test_a_gpu_holds_no_value_that_would_go_to_a_file(tmp_path, program, device, near):
    """A CPU comes near to the value nevertheless: there, computing takes longer than a file."""
    program.mapped = MappedTensors(tmp_path, torch.device(device), states=1, smallest=1)
    sweep, (first, *_) = Sweep(program, batches((2, 8))), cut(program)
    sweep.approach(first, first.inputs[1], 1 << 30)
    assert [first.inputs[1] in state for state in sweep.states] == [near]


def test_approaching_a_value_again_computes_nothing(program):
    first, *_ = cut(program)
    runner = Counting(program)
    sweep = Sweep(program, [program.example], runner)
    sweep.approach(first, first.inputs[1], 1 << 30)
    assert runner.ran == first.nodes.index(first.inputs[1]) + 1
    for value in first.inputs:
        sweep.approach(first, value, 1 << 30)
    sweep.advance(first)
    assert runner.ran == len(first.nodes)


class Counting(Runner):
    """Counts the nodes it computes."""

    ran = 0

    def run_node(self, n):
        self.ran += 1
        return super().run_node(n)


def test_looking_computes_no_more_than_it_needs(program):
    first, *_ = cut(program)
    runner = Counting(program)
    Sweep(program, [program.example], runner).observe(first, {first.inputs[0]: [Sum()]})
    assert runner.ran == first.nodes.index(first.inputs[0]) + 1


class InPlace(nn.Module):
    """A residual stream that is written to: `h += ...`, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(2))

    def forward(self, x):
        x.mul_(2)
        h = self.embed(x)
        for block in self.blocks:
            h += block(h)
        return h


def test_a_model_that_writes_in_place_can_be_looked_at():
    """Looking shows the values that moving shows, however often, and the user's batch is not written to."""
    x = torch.randn(4, 32)
    program, kept = trace(InPlace().eval(), x.clone()), x.clone()
    sweep, sums = Sweep(program, [Inputs((x,))]), []
    for segment in find_segments(program, choose(program).matmuls):
        observers = [Last() for _ in range(3)]
        value = segment.outputs[-1]
        for observer in observers[:2]:
            sweep.observe(segment, {value: [observer]})
            sweep.approach(segment, segment.matmuls[0].activation, 0)
        sweep.advance(segment, {value: [observers[2]]})
        sums.append(observers[0].value)
        assert all(torch.equal(observer.value, observers[2].value) for observer in observers)
    assert torch.equal(x, kept)
    assert torch.equal(sums[-1], program(x))


# AlteredRun


def test_a_prepared_input_is_prepared_once_for_all_its_readers(program):
    """q, k and v read one value: one call, and the same as if the value itself were another."""
    first, *_ = cut(program)
    calls = []

    def halved(x: Tensor) -> Tensor:
        calls.append(x)
        return x / 2

    value = first.inputs[0]
    altered = AlteredRun(program, dict.fromkeys(first.readers_of(value), halved))
    nodes = [matmul.node for matmul in first.readers_of(value)]
    given = bind_inputs(program, program.example)
    found = altered.run_nodes(first.nodes, given, None, [*nodes, value])
    plain = Runner(program).run_nodes(first.nodes, given, None, [*nodes, value])
    assert len(calls) == 1
    assert torch.equal(found[value], plain[value])  # what else reads it reads it as it was
    assert all(torch.equal(found[node], plain[node] / 2) for node in nodes)
    altered.run_nodes(first.nodes, given)
    assert len(calls) == 2


def test_a_prepared_input_is_freed_at_the_end_of_a_run(program):
    first, *_ = cut(program)
    prepared = []

    def halved(x: Tensor) -> Tensor:
        result = x / 2
        prepared.append(ref(result))
        return result

    altered = AlteredRun(program, dict.fromkeys(first.readers_of(first.inputs[0]), halved))
    altered.run_nodes(first.nodes, bind_inputs(program, program.example))
    assert [value() for value in prepared] == [None]


def test_a_replaced_tensor(program):
    """The same as a program that holds it; the program itself, and a plain run, stay as they were."""
    first, *_ = cut(program)
    name = first.matmuls[0].parameter
    other = program.tensor(name).detach() * 3
    given, before = bind_inputs(program, program.example), program.tensor(name)
    altered = AlteredRun(program, {}, {name: other})
    found = altered.run_nodes(first.nodes, given, None, first.outputs)
    plain = Runner(program).run_nodes(first.nodes, given, None, first.outputs)
    assert program.tensor(name) is before
    program.set_tensor(name, other)
    wanted = Runner(program).run_nodes(first.nodes, given, None, first.outputs)
    assert all(torch.equal(found[node], wanted[node]) for node in first.outputs if isinstance(wanted[node], Tensor))
    assert not torch.equal(found[first.outputs[-1]], plain[first.outputs[-1]])
    altered.tensors = {name: before}
    again = altered.run_nodes(first.nodes, given, None, first.outputs)
    assert torch.equal(again[first.outputs[-1]], plain[first.outputs[-1]])


class Counter(nn.Module):
    """Counts its calls in a buffer, and adds what it has counted between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        h = self.first(x)
        return self.second(h + self.calls)


def test_every_batch_starts_from_the_traced_buffers():
    """Whatever is looked at in between; a batch that moves on takes along what it has written."""
    x = torch.randn(4, 32)
    program, batches = trace(Counter().eval(), (x,)), [Inputs((x,))] * 3
    *_, value = (matmul.activation for matmul in choose(program).matmuls)
    gathered = program.copy()
    gather_statistics(gathered, [Request(value.name, ChannelAbsMax)], batches)
    sweep, looked, moved = Sweep(program, batches), Last(), Last()
    for segment in cut(program):
        wanted = [value] if value in segment.inputs else []
        sweep.observe(segment, {node: [looked] for node in wanted})
        list(sweep.values(segment, [value]))
        sweep.advance(segment, {node: [moved] for node in wanted})
    once = nn.functional.linear(x, program.tensor("first.weight"), program.tensor("first.bias")) + 1
    torch.testing.assert_close(looked.value, once)
    torch.testing.assert_close(moved.value, once)
    torch.testing.assert_close(gathered.statistics[value.name, "ChannelAbsMax"], once.abs().amax(0))
    assert program.tensor("calls") == 0
