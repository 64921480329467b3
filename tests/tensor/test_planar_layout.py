"""A module's MX weights in the planar layout and back: same values, same files, adjacent in memory where alike."""

import copy

import pytest
import torch
from models import build, inputs, output
from torch import nn

import mxcompile
from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack
from mxcompile.tensor import planar_layout
from mxcompile.tensor.weight import MXLayout, MXWeight


def weight(fmt: MXFormat, out: int = 128, size: int = 200, dtype: torch.dtype = torch.bfloat16) -> MXWeight:
    values = torch.randn(out, size, generator=torch.Generator().manual_seed(size))
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    return MXWeight(pack(codes, fmt), scales, MXLayout(str(fmt), size), dtype)


@pytest.mark.parametrize("fmt", [*FORMATS.values(), MXINT4.with_block(128)], ids=str)
def test_planes_mean_the_same_and_go_back(fmt):
    rows = weight(fmt)
    planes = rows.to_planar()
    assert planes.shape == rows.shape
    assert torch.equal(planes.dequantize(), rows.dequantize())
    again = planes.to_row_major()
    assert again.layout_ == rows.layout_
    assert torch.equal(again.dequantize(), rows.dequantize())
    x = torch.randn(3, 200).to(torch.bfloat16)
    assert torch.equal(nn.functional.linear(x, planes), nn.functional.linear(x, rows))
    assert planes.to_planar() is planes
    assert rows.to_row_major() is rows


def test_planes_take_no_more_bytes_than_rows_padded_to_slabs():
    assert weight(MXFP4, 64, 256).to_planar().packed_bytes == weight(MXFP4, 64, 256).packed_bytes
    assert weight(MXFP4, 64, 200).to_planar().packed_bytes == weight(MXFP4, 64, 256).packed_bytes


def test_another_dtype_has_rows_and_a_copy_has_planes():
    planes = weight(MXFP8_E4M3).to_planar()
    assert planes.to(torch.float16).layout_.planes is None
    assert copy.deepcopy(planes).layout_.planes == (0, 0)
    rows = weight(MXFP8_E4M3, size=300)
    other = weight(MXFP8_E4M3, size=300)
    other.scales.add_(1)
    planes = rows.to_planar()
    planes.copy_(other)
    assert torch.equal(planes.dequantize(), other.dequantize())
    other = rows.to_planar()
    rows.copy_(planes)
    assert torch.equal(rows.dequantize(), planes.dequantize())
    assert not torch.equal(rows.dequantize(), other.dequantize())


def test_large_scales_are_lifted():
    rows = weight(MXFP4)
    rows.scales.add_(20)
    planes = rows.to_planar()
    assert planes.layout_.planes.lift > 0
    assert torch.equal(planes.dequantize(), rows.dequantize())
    assert torch.equal(planes.to_row_major().dequantize(), rows.dequantize())


def test_what_planes_cannot_hold_is_named():
    inf = weight(FORMATS["mxfp8_e5m2"])
    inf.elements[3, 5] = 0x7C
    for given, reason in (
        (weight(MXINT4.with_block(16)), "blocks of 32 or more"),
        (weight(MXINT4, out=100), "multiple of 64 outputs, not 100"),
        (inf, "codes"),
    ):
        with pytest.raises(MXCompileError, match=reason):
            given.to_planar()


@pytest.fixture
def arranged(monkeypatch):
    """A llama with tied head in the planar layout as on a GPU, the row-major one, and the weights not converted."""
    monkeypatch.setattr(planar_layout, "choices", lambda x, fmt, out: {"planes": None})
    model, example = build("llama", torch.bfloat16), inputs("llama")
    rows = mxcompile.quantize_and_compile(
        model, example, recipe="w4a8-mxint-quick", compile=False, include=["lm_head", "model.embed_tokens"]
    )
    planes = copy.deepcopy(rows)
    return planes, rows, planar_layout.use_planar_layout(planes)


def test_arranged_module(arranged, tmp_path):
    planes, rows, kept = arranged
    held = {name for name, p in planes.named_parameters() if isinstance(p, MXWeight) and p.layout_.planes is not None}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in held} >= {"q_proj", "o_proj", "gate_proj"}
    assert held.isdisjoint(kept)
    with torch.no_grad():
        assert torch.equal(output(planes(**inputs("llama"))), output(rows(**inputs("llama"))))
    mxcompile.save(planes, tmp_path / "planes")
    mxcompile.save(rows, tmp_path / "rows")
    for path in (tmp_path / "rows").iterdir():
        assert path.read_bytes() == (tmp_path / "planes" / path.name).read_bytes()
    assert planar_layout.use_planar_layout(planes) == kept  # once more changes nothing


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name, out, fmt in (("k", 64, MXINT4), ("q", 128, MXINT4), ("o", 64, MXFP4), ("v", 64, MXINT4)):
            self.register_parameter(name, nn.Parameter(weight(fmt, out), requires_grad=False))


def test_alike_weights_lie_side_by_side(monkeypatch):
    from mxcompile.kernels.gpu_linears import _adjacent_groups

    monkeypatch.setattr(planar_layout, "choices", lambda x, fmt, out: {"planes": None})
    module = Attention()
    before = {name: value.dequantize() for name, value in module.named_parameters()}
    assert planar_layout.use_planar_layout(module) == {}
    assert all(torch.equal(value.dequantize(), before[name]) for name, value in module.named_parameters())
    parts = {name: (value.elements, value.scales, None) for name, value in module.named_parameters()}
    assert [len(group) for group in _adjacent_groups([parts[name] for name in "kqvo"])] == [3, 1]
    assert [len(group) for group in _adjacent_groups([parts[name] for name in "qkv"])] == [1, 1, 1]
    with_bias = (*parts["q"][:2], torch.zeros(128))
    assert [len(group) for group in _adjacent_groups([parts["k"], with_bias])] == [1, 1]
