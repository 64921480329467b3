"""Damaged files of other projects: either a CheckpointError, or the model that the bytes describe."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from interop import quantized

import mxcompile
from mxcompile.checkpoint.interop import compressed_tensors, files
from mxcompile.checkpoint.interop.gguf_file import GGUFFile
from mxcompile.errors import CheckpointError

pytest.importorskip("gguf", reason="install the test extra")
pytestmark = pytest.mark.filterwarnings("ignore:.*llama.cpp takes and returns token ids only:UserWarning")
TRIED = 300
FUZZ = settings(
    max_examples=TRIED,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def damages(draw, data: bytes, header: int) -> bytes:
    """Bits flipped, cut, added to or numbers replaced, mostly in the header."""
    damaged = bytearray(data)
    last = draw(st.sampled_from([header, header, header, len(data)])) - 1
    place = draw(st.integers(0, last))
    match draw(st.sampled_from(["flip", "cut", "grow", "number"])):
        case "flip":
            damaged[place] ^= 1 << draw(st.integers(0, 7))
        case "cut":
            del damaged[place:]
        case "grow":
            damaged[place:place] = draw(st.binary(min_size=1, max_size=9))
        case _:
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]))
            damaged[place : place + 8] = number.to_bytes(8, "little")
    return bytes(damaged)


def outcomes(path: Path, whole: bytes, header: int, read) -> tuple[int, int]:
    """How many damaged files were refused, and how many read."""
    refused = accepted = 0

    @FUZZ
    @given(damages(whole, header))
    def check(data):
        nonlocal refused, accepted
        path.write_bytes(data)
        try:
            read()
            accepted += 1
        except CheckpointError:
            refused += 1

    check()
    path.write_bytes(whole)
    read()
    return refused, accepted


def test_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    mxcompile.save(quantized(dtype=torch.float32), path)
    whole = path.read_bytes()
    header = min(entry.start for entry in GGUFFile(path).entries.values())
    refused, accepted = outcomes(path, whole, header, lambda: mxcompile.read_gguf(path))
    assert refused + accepted >= TRIED
    assert refused > TRIED // 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_compressed_tensors(name, tmp_path):
    """Of these without the building of a model, which takes transformers a tenth of a second."""
    folder = tmp_path / "model"
    mxcompile.save(quantized("mxfp4", "none"), folder, format="compressed-tensors")
    whole = (folder / name).read_bytes()
    header = 2000 if name == "model.safetensors" else len(whole)

    def read():
        config = files.read_json(folder / "config.json")[1]
        return compressed_tensors.read(folder, config)

    refused, accepted = outcomes(folder / name, whole, header, read)
    assert refused + accepted >= TRIED
    assert refused > TRIED // 4


def test_damaged_files_do_not_build_models(tmp_path):
    """The same with all of the load, on fewer."""
    path = tmp_path / "model.gguf"
    mxcompile.save(quantized(dtype=torch.float32), path)
    whole = path.read_bytes()
    for place in range(0, 900, 23):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            loaded = mxcompile.load(path)
        except CheckpointError:
            continue
        assert not any(tensor.is_meta for tensor in loaded.parameters())
