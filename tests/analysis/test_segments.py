"""Segments: where a graph is cut, what is live across a cut, and that running segments equals running the graph."""

from functools import cache

import models
import pytest
import torch
from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import find_groups
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.runs.run import Runner
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace

LAYERS = 3


@cache
def llama() -> Program:
    return trace(models.llama(LAYERS), models.inputs("llama"))


@cache
def architecture(name: str) -> Program:
    """A model of that architecture with two layers, traced."""
    auto = {
        "vit": "AutoModelForImageClassification",
        "t5": "AutoModelForSeq2SeqLM",
        "bart": "AutoModelForSeq2SeqLM",
    }.get(name, "AutoModelForCausalLM")
    batch = models.inputs(name)
    if auto == "AutoModelForSeq2SeqLM":
        batch["decoder_input_ids"] = models.inputs(name, seed=1)["input_ids"]
    return trace(models.two_layers(name, auto), batch)


def cut(program: Program) -> tuple[Segment, ...]:
    """Its segments, as a search for folds needs them: no value of a scale group is carried."""
    matmuls = choose(program).matmuls
    groups, _ = find_groups(program, matmuls)
    return find_segments(program, matmuls, [group.values for group in groups])


def carried(program: Program, segments: tuple[Segment, ...]) -> list[list[str]]:
    """For every segment, the tensors known behind it that depend on a parameter and are still to be read."""
    learned, passed, result = set(), set(), []
    for node in program.graph.nodes:
        own = node.op == "get_attr" and program.is_parameter(node.target)
        if own or any(source in learned for source in node.all_input_nodes):
            learned.add(node)
    for segment in segments:
        passed.update(segment.nodes)
        read_later = [node for node in passed & learned if node.users.keys() - passed]
        result.append([node.name for node in read_later if isinstance(node.meta["val"], Tensor)])
    return result


def readers(segment: Segment) -> str:
    """`q_proj k_proj`: the modules that multiply in it, without where they are."""
    return " ".join(matmul.module_path.rpartition(".")[2] for matmul in segment.matmuls)


def compute_nodes(program: Program) -> list:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def test_a_llama_is_cut_behind_every_attention_and_mlp():
    segments = cut(llama())
    assert [readers(s) for s in segments] == ["q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"] * LAYERS
    assert [[len(s.readers_of(value)) for value in s.inputs] for s in segments] == [[3, 1], [2, 1]] * LAYERS


def test_a_llama_carries_the_residual_stream_alone():
    """One tensor `[batch, tokens, hidden]`, a sum; the first segment also gives what no parameter has touched."""
    program = llama()
    segments = cut(program)
    assert carried(program, segments) == [[segment.outputs[-1].name] for segment in segments]
    streams = [segment.outputs[-1] for segment in segments]
    assert {stream.target for stream in streams} == {torch.ops.aten.add.Tensor}
    assert {stream.meta["val"].shape[-1] for stream in streams} == {64}
    assert [len(segment.outputs) for segment in segments[1:]] == [1] * (2 * LAYERS - 1)


CARRIED = {
    "gpt2": [1, 1, 1, 1],
    "gpt_neox": [1, 1],  # attention and MLP in parallel: one segment a layer
    "mixtral": [1, 1, 1, 1],
    "qwen2_moe": [1, 1, 1, 1],  # five inputs in an MLP: experts, shared expert and its gate
    "vit": [1, 1, 1, 1, 1],
    "t5": [2, 1, 1, 3, 3, 2, 2, 2],  # position bias of an encoder or decoder; in the decoder also the encoder's result
    "bart": [1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
}


ARCHITECTURES = [pytest.param(name, marks=[] if name in ("mixtral", "t5") else [pytest.mark.slow]) for name in CARRIED]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    """Every wanted matmul is in one segment, in order; little is carried, and nothing that a fold divides."""
    program = architecture(name)
    segments = cut(program)
    assert [m for s in segments for m in s.matmuls] == list(choose(program).matmuls)
    nodes = [node for segment in segments for node in segment.nodes]
    assert nodes == compute_nodes(program)[: len(nodes)]
    assert [len(names) for names in carried(program, segments)] == CARRIED[name]
    divided = {node.name for group in find_groups(program, choose(program).matmuls)[0] for node in group.values}
    assert not divided & {name for names in carried(program, segments) for name in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_piece_by_piece_is_the_whole(name):
    """Bit for bit, what the last segment gives."""
    program = architecture(name)
    segments = cut(program)
    sweep = Sweep(program, [program.example])
    for segment in segments:
        sweep.advance(segment)
    outputs = segments[-1].outputs
    whole = Runner(program).run_nodes(compute_nodes(program), bind_inputs(program, program.example), None, outputs)
    assert outputs
    assert all(torch.equal(sweep.states[0][node], whole[node]) for node in outputs)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_the_last_segment_may_reach_the_output(name, traced):
    program, batch = traced(name), models.inputs(name)
    sweep = Sweep(program, [program.example])
    for segment in cut(program):
        sweep.advance(segment)
    result = models.output(program(**batch))
    assert any(value.shape == result.shape and torch.equal(value, result) for value in sweep.states[0].values())


def test_uncut_values_are_never_carried():
    """A cut that carries a value which must not be carried goes away, the others stay."""
    program = llama()
    matmuls = choose(program).matmuls
    free = find_segments(program, matmuls)
    for place in range(2 * LAYERS - 1):
        stream = free[place].outputs[-1]
        other = find_segments(program, matmuls, [[stream]])
        assert stream.name not in {name for names in carried(program, other) for name in names}
        assert other[:place] == free[:place]
        assert [m for s in other for m in s.matmuls] == list(matmuls)


def test_no_cut_allowed_is_one_segment():
    """However many inputs that makes."""
    program = llama()
    matmuls = choose(program).matmuls
    (segment,) = find_segments(program, matmuls, [compute_nodes(program)[:-1]])
    assert segment.matmuls == tuple(matmuls)


def test_no_wanted_matmul_is_no_segment(traced):
    assert find_segments(traced("mlp"), ()) == ()


def test_an_unwanted_matmul_is_passed_through():
    """Only the wanted ones count as inputs, the others are computed all the same."""
    program = llama()
    wanted = [matmul for matmul in choose(program).matmuls if "down_proj" in matmul.module_path]
    segments = find_segments(program, wanted)
    assert [matmul for segment in segments for matmul in segment.matmuls] == wanted
    nodes = [node for segment in segments for node in segment.nodes]
    assert nodes == compute_nodes(program)[: len(nodes)]
