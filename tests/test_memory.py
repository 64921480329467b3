"""Quantizing, deploying, loading and running experts need one expert tensor (a 3-D float parameter) beyond what stays.

What stays is the packed model, and the float weights that folds have changed, until they are rounded. Expert tensors
have 1 MiB here, and slices of weights (`row_slices.py`) and samples of outputs are smaller than usual, so that only
what grows with the weights counts.
"""

from typing import Any

import pytest
import torch
from allocations import Allocations, counted_allocations
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mxcompile
from mxcompile.calibration.searches import group_facts
from mxcompile.graph.program import Program
from mxcompile.kernels.layout import rows_to_planes
from mxcompile.numerics import metrics, row_slices
from mxcompile.ops import QUANTIZE
from mxcompile.passes.recipes import as_pipeline
from mxcompile.pipeline.interfaces import Instrument
from mxcompile.tensor import planar_layout
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.planar_layout import use_planar_layout
from mxcompile.tensor.weight import MXLayout, MXWeight

LAYERS, EXPERTS, SIZE = 2, 64, 64
TENSOR = EXPERTS * 2 * SIZE * SIZE * 2
LIMIT = 1.5
"""In expert tensors: one, and what does not grow with it (slices, activations); another would not fit."""


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    for module in (row_slices, rows_to_planes):
        monkeypatch.setattr(module, "SLICE_VALUES", 1 << 13)
        monkeypatch.setattr(module, "SLICE_VALUES_ON_GPU", 1 << 14)
    monkeypatch.setattr(metrics, "_VALUES", 1 << 13)
    monkeypatch.setattr(group_facts, "_LARGEST_SAMPLE", 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    sizes = {"hidden_size": SIZE, "moe_intermediate_size": SIZE, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=LAYERS, vocab_size=64, use_cache=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).bfloat16().eval()


def ids(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 64, (batch, 16), generator=torch.Generator().manual_seed(batch))}


class PassAllocations(Instrument):
    """The allocations of every pass, by its name."""

    def __init__(self) -> None:
        self.passes: dict[str, Allocations] = {}
        self._counting: Any = None

    def before(self, program, step):
        self._counting = counted_allocations()
        self.passes[step.current.name] = self._counting.__enter__()

    def after(self, program, step, record):
        self._counting.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        ("round-weights{format=mxfp4} | lower-mx{weight=mxfp4}", 0.95),
        pytest.param(
            "gptq{format=mxint4,activation=mxint8,correction=0.25} | tune-vectors{steps=1} "
            "| lower-mx{weight=mxint4,activation=mxint8}",
            0.95,
            marks=pytest.mark.slow,
        ),
        ("lower-mx{weight=mxint8}", 1.7),
        ("smooth-quant", 2.2),
        ("permute", 3.2),
        pytest.param("rotate{weight=mxfp4,activation=mxfp4}", 3.2, marks=pytest.mark.slow),
        pytest.param("awq-fold{weight=mxint4,grid=1,objective=block}", 2.2, marks=pytest.mark.slow),
        pytest.param("awq-fold{weight=mxint4,grid=1}", 2.2, marks=pytest.mark.slow),
    ],
)
def test_passes(model, recipe, kept):
    """kept: what the passes together may leave, packed or changed in float, of experts of three expert tensors."""
    watcher = PassAllocations()
    program = mxcompile.trace(model, ids(2))
    as_pipeline(recipe).run(program, [ids(2), ids(3)], [watcher])
    assert {name: each for name, each in watcher.passes.items() if each.above > LIMIT * TENSOR} == {}
    assert sum(each.kept for each in watcher.passes.values()) < kept * TENSOR


@pytest.fixture(scope="module")
def program(model) -> Program:
    return as_pipeline("lower-mx{weight=mxfp4,activation=mxfp8_e4m3}").run(mxcompile.trace(model, ids(2)))


@pytest.fixture
def deployed(program, model) -> nn.Module:
    return mxcompile.deploy(program, model, check=False)


def test_trace(model):
    with counted_allocations() as allocations:
        mxcompile.trace(model, ids(2))
    assert allocations.peak < 0.2 * TENSOR


def test_deploy(program, model):
    """Its check decodes the weights of the lowered program one after the other; the module has the program's bytes."""
    with counted_allocations() as allocations:
        mxcompile.deploy(program, model)
    assert TENSOR < allocations.peak < LIMIT * TENSOR
    assert allocations.kept < 0.2 * TENSOR


def test_forward(deployed):
    with counted_allocations() as allocations, torch.no_grad():
        deployed(**ids(2))
    assert allocations.peak < 0.5 * TENSOR


def test_saving_and_loading(deployed, tmp_path):
    """Nothing but the packed bytes, which are memory-mapped."""
    with counted_allocations() as allocations:
        mxcompile.save(deployed, tmp_path / "model")
        loaded = mxcompile.load(tmp_path / "model")
    assert allocations.peak < 2.1 * stored_bytes(deployed)  # transformers and we map the files
    assert stored_bytes(loaded) == stored_bytes(deployed)


class Experts(nn.Module):
    """Four MX weights of the size of an expert tensor, in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(4))
        for layer in self.layers:
            elements, scales = QUANTIZE(torch.randn(TENSOR // 2 // 256**2, 256, 256), "mxfp4", "floor")
            weight = MXWeight(elements, scales, MXLayout("mxfp4", 256), torch.bfloat16)
            layer.weight = nn.Parameter(weight, requires_grad=False)


def test_conversion_to_planes(monkeypatch):
    """Of all weights, as for a GPU: each row-major weight is freed when its planar form replaces it."""
    monkeypatch.setattr(planar_layout, "choices", lambda *_: {"planes": None})
    module = Experts()
    with counted_allocations() as allocations:
        for layer in module.layers:
            elements, scales = (part.clone() for part in layer.weight.parts)
            weight = MXWeight(elements, scales, layer.weight.layout_, torch.bfloat16)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        del layer, elements, scales, weight
        assert use_planar_layout(module) == {}
    assert TENSOR < allocations.kept < 1.1 * TENSOR
    assert allocations.above < 0.6 * TENSOR


def test_decoding_planes():
    planes = Experts().layers[0].weight.to_planar()
    with counted_allocations() as allocations:
        values = planes.dequantize()
    assert allocations.kept == values.nbytes == TENSOR
    assert allocations.above < 0.75 * TENSOR  # row-major bytes, and slices
    with counted_allocations() as allocations:
        rows = planes.to_row_major()
    assert allocations.kept == rows.packed_bytes
    assert allocations.above < 0.3 * TENSOR
