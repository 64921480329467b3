"""SmolLM2-135M, a real model: accuracy, size, coverage. Skipped where it has not been fetched."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from models import build, inputs
from safetensors.torch import load_file

import mxcompile
from mxcompile.calibration.data.windows import token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not smollm2.cached_file().exists(), reason="SmolLM2 is not in the cache: python -m mxcompile.cli.smollm2"
    ),
]


@pytest.fixture(scope="module")
def real():
    model, tokenizer = smollm2.load()
    tokens = tokenizer(help_text(), return_tensors="pt").input_ids[0]
    torch.set_num_threads(2)
    yield model, list(islice(token_windows(tokens, 2048), 4))
    torch.set_num_threads(1)


def test_w8a8_mxint_with_plain_rounding_is_within_a_percent_and_a_half(real):
    """2047 tokens of Python's help topics."""
    model, windows = real[0], real[1][:1]
    quantized = mxcompile.quantize_and_compile(
        model, {"input_ids": windows[0][:, :64]}, recipe="w8a8-mxint-quick", compile=False
    )
    before, after = evaluate(model, windows), evaluate(quantized, windows, model)
    assert after.perplexity < 1.015 * before.perplexity
    assert after.top1 > 0.93
    assert after.kl < 0.02


@pytest.fixture(scope="module")
def w4a8(real):
    model, windows = real
    example = {"input_ids": windows[0][:, :64]}
    return mxcompile.quantize_and_compile(model, example, recipe="w4a8-mxint-quick", compile=False)


def test_w4a8_covers_every_decoder_linear_at_its_true_size(real, w4a8):
    model, quantized = real[0], w4a8
    packed = [p for p in quantized.parameters() if isinstance(p, MXWeight)]
    assert len(packed) == 210
    assert sum(p.packed_bytes for p in packed) * 8 == sum(p.numel() for p in packed) * 4.25
    assert stored_bytes(quantized) < 0.32 * stored_bytes(model)


def test_mxfp4_for_other_programs_comes_back_to_the_bit(real, tmp_path):
    """As compressed-tensors decodes it, as we do, and 4.25 bits a value; in GGUF the same, but float16 matrices."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="install the test extra")
    from compressed_tensors.quantization import preset_name_to_scheme

    model, windows = real
    quantized = mxcompile.quantize_and_compile(
        model, {"input_ids": windows[0][:, :64]}, recipe="lower-mx{weight=mxfp4,activation=none}", compile=False
    )
    with pytest.warns(UserWarning, match="this model is in float32"):
        mxcompile.save(quantized, tmp_path / "model", format="compressed-tensors")
    with pytest.warns(UserWarning, match="tokenizer"):
        mxcompile.save(quantized, tmp_path / "model.gguf")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    wanted = dict(quantized.named_parameters())
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    compressor = compressors.BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    for path in (tmp_path / "model", tmp_path / "model.gguf"):
        loaded = mxcompile.load(path)
        for name, tensor in loaded.named_parameters():
            other = wanted[name]
            assert type(tensor) is type(other), name
            values = [p.dequantize() if isinstance(p, MXWeight) else p for p in (tensor, other)]
            if path.suffix == ".gguf" and not isinstance(other, MXWeight) and other.dim() == 2:
                values[1] = values[1].half().float()  # as llama.cpp's own tool writes them
            assert torch.equal(*values), name
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]:
        parts = {"weight_packed": stored[f"{name}_packed"], "weight_scale": stored[f"{name}_scale"]}
        theirs = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(theirs.float(), wanted[name].dequantize().float()), name
    written = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert 0 < written - stored_bytes(quantized) < 60_000


LOADED = """
import sys
import torch
import mxcompile

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

tiny, folder, ids, logits = sys.argv[1:]
mxcompile.load(tiny)  # imports all there is to import
before = peak()
model = mxcompile.load(folder)
taken = peak() - before
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, logits)
print(taken)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_saved_and_loaded_in_another_process(real, w4a8, tmp_path):
    """Measured: 1.13 of the packed size, 55 kB of headers, the same logits to the bit."""
    folder, ids, logits = tmp_path / "model", tmp_path / "ids.pt", tmp_path / "logits.pt"
    w4a8.save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    assert 0 < weights.stat().st_size - stored_bytes(w4a8) < 60_000
    torch.save(real[1][0][:, :64], ids)
    tiny = mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe="w8a8-mxint-quick", compile=False)
    tiny.save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", LOADED, tmp_path / "tiny", folder, ids, logits]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.2 * stored_bytes(w4a8)
    with torch.no_grad():
        assert torch.equal(torch.load(logits), w4a8(real[1][0][:, :64]).logits)
