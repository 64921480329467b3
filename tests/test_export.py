"""Exported models: an archive needs torch and mxcompile.ops alone, an AOT package torch alone; same outputs."""

import subprocess
import sys
import warnings

import pytest
import torch
from models import build, inputs, output

import mxcompile
from mxcompile.errors import CheckpointError, CompileError, InputError
from mxcompile.inductor import why_no_inductor
from mxcompile.numerics.metrics import sqnr_db

CPU = torch.device("cpu")
missing = why_no_inductor(CPU)
needs_compiler = pytest.mark.skipif(missing is not None, reason=str(missing))


def deployed(name, recipe="w4a8-mxint-quick", **options):
    return mxcompile.quantize_and_compile(build(name), inputs(name), recipe=recipe, compile=False, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model, its settings before it was exported, and its archive."""
    model = deployed("llama")
    before = dict(vars(model.config))
    return model, before, mxcompile.export(model, inputs("llama"), tmp_path_factory.mktemp("llama") / "model.pt2")


@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "mixtral", "bert", "vit"))],
)
def test_archive_computes_the_same_on_other_sizes(name, tmp_path):
    model = deployed(name)
    path = mxcompile.export(model, inputs(name), tmp_path / "model.pt2")
    loaded = torch.export.load(path).module()
    x = inputs(name, batch=3, length=11, seed=5)
    with torch.no_grad():
        wanted, given = output(model(**x)), output(loaded(**x))
    assert sqnr_db(wanted, given) > 100  # same kernels; only one of them flattens the token dimensions
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_archive_holds_packed_weights_and_fused_calls(tmp_path):
    path = mxcompile.export(deployed("mlp"), inputs("mlp"), tmp_path / "model.pt2")
    program = torch.export.load(path)
    calls = [str(node.target) for node in program.graph.nodes if "mx" in str(node.target)]
    assert calls == ["mx.quantize_dequantize.default", "mx.linear.default"] * 2
    assert sum(value.dtype == torch.uint8 for value in program.state_dict.values()) == 4


LOAD = """
import sys, torch
import mxcompile.ops
archive, x, out = sys.argv[1:]
module = torch.export.load(archive).module()
with torch.no_grad():
    torch.save(module(**torch.load(x))["logits"], out)
assert "transformers" not in sys.modules
"""


@pytest.mark.slow
def test_archive_needs_torch_and_ops_alone(llama, tmp_path):
    """A Hugging Face model, in a process that never imports transformers, on another batch and length."""
    model, _, archive = llama
    x = inputs("llama", batch=3, length=11, seed=3)
    torch.save(x, tmp_path / "x.pt")
    files = [str(path) for path in (archive, tmp_path / "x.pt", tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, *files], check=True)
    with torch.no_grad():
        assert sqnr_db(model(**x).logits, torch.load(tmp_path / "out.pt")) > 100


def test_a_compiled_module_is_exported_as_it_is(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # without a compiler it says that it runs uncompiled
        model = mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), recipe="w4a8-mxint-quick")
    loaded = torch.export.load(mxcompile.export(model, inputs("mlp"), tmp_path / "model.pt2")).module()
    plain = deployed("mlp")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("mlp")), plain(**inputs("mlp")))


def test_rotations_and_multipliers_are_exported(tmp_path):
    recipe = "awq-fold{weight=mxfp4,activation=mxfp4} | rotate{weight=mxfp4,activation=mxfp4} | "
    recipe += "round-weights{format=mxfp4} | lower-mx{weight=mxfp4,activation=mxfp4}"
    model = deployed("gpt2", recipe)
    loaded = torch.export.load(mxcompile.export(model, inputs("gpt2"), tmp_path / "model.pt2")).module()
    calls = {str(node.target) for node in loaded.graph.nodes}
    assert "mx.rotate.default" in calls
    with torch.no_grad():
        assert sqnr_db(output(model(**inputs("gpt2"))), output(loaded(**inputs("gpt2")))) > 100


RUN = """
import sys, torch
from torch._inductor import aoti_load_package
package, x, out = sys.argv[1:]
torch.save(aoti_load_package(package)(**torch.load(x)), out)
assert "mxcompile" not in sys.modules
"""


@pytest.mark.slow
@needs_compiler
def test_compiled_ahead_it_needs_torch_alone(tmp_path, monkeypatch):
    """The reference, compiled: the same outputs in a process without mxcompile, for another batch size.

    torch's settings stay as they were: else other processes would miss its compile cache for what this one compiles
    afterwards.
    """
    from torch._inductor import config

    monkeypatch.setattr("mxcompile.numerics.row_slices.SLICE_VALUES", 256)  # as if the weights were large
    model = deployed("mlp", "rotate{weight=mxint4,activation=mxfp4} | lower-mx{weight=mxint4,activation=mxfp4}")
    with config.patch({"aot_inductor.metadata": {}}):
        mxcompile.export(model, inputs("mlp"), tmp_path / "model.pt2", compile=True)
        assert not config.aot_inductor.metadata
    x = inputs("mlp", batch=3, length=11, seed=5)
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "out.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, *files], check=True)
    with torch.no_grad():
        assert sqnr_db(model(**x), torch.load(tmp_path / "out.pt")) > 100


@pytest.mark.slow
@needs_compiler
def test_experts_compiled_ahead_need_torch_alone(tmp_path):
    """With other sums inside the matmuls, whose results are rounded to 8 bits again."""
    model = deployed("mixtral", "w4a8-mxint-quick")
    mxcompile.export(model, inputs("mixtral"), tmp_path / "model.pt2", compile=True)
    torch.save(inputs("mixtral"), tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "out.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, *files], check=True)
    with torch.no_grad():
        expected = output(model(**inputs("mixtral")))
    assert sqnr_db(expected, output(torch.load(tmp_path / "out.pt", weights_only=False))) > 60


def test_what_cannot_be_exported_says_so(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="MLP has no MX weights: pass the result of quantize_and_compile or deploy"):
        mxcompile.export(build("mlp"), inputs("mlp"), tmp_path / "model.pt2")
    model = deployed("mlp")
    with pytest.raises(InputError, match=r"must end in \.pt2"):
        mxcompile.export(model, inputs("mlp"), tmp_path / "model.bin")
    with pytest.raises(InputError, match=r"do not fit MLP\.forward"):
        mxcompile.export(model, {"y": torch.zeros(1)}, tmp_path / "model.pt2")
    monkeypatch.setattr("mxcompile.inductor.aot_package.why_no_compiler", lambda _: "no compiler here")
    with pytest.raises(CompileError, match="no compiler here"):
        mxcompile.export(model, inputs("mlp"), tmp_path / "model.pt2", compile=True)
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("older")
    monkeypatch.setattr("torch.export.save", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(CheckpointError, match=r"model\.pt2 cannot be written \(the disk is full\)"):
        mxcompile.export(deployed("mlp"), inputs("mlp"), path)
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_does_not_end_the_process(tmp_path):
    """torch's own archive writer aborts it."""
    import resource

    model, limits = deployed("mlp"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model\.pt2 cannot be written \(\[Errno 27\] File too large"):
            mxcompile.export(model, inputs("mlp"), tmp_path / "model.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_known_before_the_trace(tmp_path, monkeypatch):
    monkeypatch.setitem(mxcompile.export.__globals__, "exported_program", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "model.pt2").mkdir()
    model = deployed("mlp")
    for name, reason in (("file/model.pt2", "a file, not a folder"), ("model.pt2", "a folder, not a file")):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be written .*it is {reason}"):
            mxcompile.export(model, inputs("mlp"), tmp_path / name)


def test_the_model_stays_as_it_was(llama):
    model, before, _ = llama
    assert vars(model.config) == before
    assert "forward" not in vars(model)
