"""The benchmark of folds on one model of each kind: every scale group is folded, and the function is kept."""

import pytest
from architectures import build, inputs
from folds import REQUIRED_DB, measure

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import find_groups

KINDS = {
    "qwen2": "biases on q, k and v",
    "gemma2": "1 + weight, norms before and after",
    "phi3": "fused qkv and gate_up",
    "gpt_neox": "fused qkv, parallel branches",
    "falcon": "one norm for attention and MLP, multi-query",
    "opt": "relu between the linears",
    "qwen2_moe": "router, shared expert and its gate",
    "gpt_oss": "experts with biases, attention sinks",
    "deepseek_v3": "low-rank projections with norms of their own",
    "mamba": "no attention",
    "t5_v1_1": "encoder and decoder, gated gelu",
    "bart": "norms after the residual",
    "whisper": "convolutions in front",
    "dinov2": "a classifier on two readings of one norm",
}


FAST = ("gpt_neox", "qwen2_moe", "mamba", "t5_v1_1")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=f"{name}: {kind}", marks=[] if name in FAST else [pytest.mark.slow])
        for name, kind in KINDS.items()
    ],
)
def test_folds_keep_the_function(name):
    record = measure(name)
    assert record["groups"] == record["folded"] > 0
    assert min(record["sqnr_db_smooth"], record["sqnr_db_awq"]) >= REQUIRED_DB


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mistral"))]
)
def test_every_decoder_linear_is_in_a_group(name):
    program = mxcompile.trace(build(name), inputs(name))
    groups, unfoldable = find_groups(program, choose(program).matmuls)
    assert unfoldable == []
    assert len(groups) == 2 * 4
