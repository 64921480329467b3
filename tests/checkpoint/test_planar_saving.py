"""Planar weights are saved row-major, one at a time; saving reports how far it is."""

import copy
import weakref

import pytest
import torch
from models import build, inputs

import mxcompile
from mxcompile.checkpoint.streamed_save import StreamedSave
from mxcompile.tensor.modules import named_tensors, set_tensors
from mxcompile.tensor.weight import MXWeight


@pytest.fixture(scope="module")
def quantized():
    return mxcompile.quantize_and_compile(build("mixtral"), inputs("mixtral"), recipe="w4a16-mxfp-quick", compile=False)


@pytest.fixture
def planar(quantized):
    module = copy.deepcopy(quantized)
    weights = {name: w for name, w in named_tensors(module).items() if isinstance(w, MXWeight)}
    planes = {name: weight.to_planar() for name, weight in weights.items() if weight.elements.shape[-2] % 64 == 0}
    assert len(planes) > 3
    set_tensors(module, planes.items())
    return module


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_bytes_are_those_of_row_major_weights(quantized, planar, tmp_path):
    for name, module in (("rows", quantized), ("planes", planar)):
        mxcompile.save(module, tmp_path / name)
    assert files(tmp_path / "rows") == files(tmp_path / "planes")


def test_one_weight_is_row_major_at_a_time(planar, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []
    convert = MXWeight.to_row_major

    def watched(self):
        made = convert(self)
        if made is not self:
            alive.add(made.elements)
            most.append(len(alive))
        return made

    monkeypatch.setattr(MXWeight, "to_row_major", watched)
    mxcompile.save(planar, tmp_path / "planes")
    names = [name for name, w in planar.named_parameters() if isinstance(w, MXWeight) and w.layout_.planes is not None]
    assert len(most) == len(names)  # each is converted once
    assert max(most) == 1


def test_the_progress_of_writing(quantized, tmp_path):
    seen: list[tuple[int, int]] = []
    mxcompile.save(quantized, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen == [(done, len(seen)) for done in range(len(seen))]
    assert len(seen) > len(list(quantized.parameters()))
    mxcompile.save(quantized, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_a_streamed_save_takes_planar_weights(quantized, planar, tmp_path):
    mxcompile.save(quantized, tmp_path / "rows")
    with StreamedSave(tmp_path / "streamed", "key") as saving:
        for name, tensor in named_tensors(planar, row_major=False).items():
            saving.add(name, {name: tensor})
        name = next(name for name, w in planar.named_parameters() if isinstance(w, MXWeight))
        assert torch.equal(saving.read(name).dequantize(), planar.get_parameter(name).dequantize())
        saving.commit(planar)
    assert files(tmp_path / "rows") == files(tmp_path / "streamed")
