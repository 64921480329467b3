"""Models that are not in transformers: their code is saved, or the save says that it is not; hub ids; processors."""

import sys
import warnings

import pytest
import torch
from checkpoints import assert_runs, assert_same, deployed
from models import inputs

import mxcompile
from mxcompile.checkpoint import Checkpoint
from mxcompile.errors import CheckpointError

CONFIGURATION = """
from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_of_my_own"

    def __init__(self, width=64, **others):
        self.width = width
        super().__init__(**others)
"""
MODELING = """
import torch
from transformers import PreTrainedModel

from .configuration_tiny import TinyConfig
from .layers_tiny import Double


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.up = torch.nn.Linear(config.width, 2 * config.width)
        self.down = Double(2 * config.width, config.width)
        self.post_init()

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))
"""
LAYERS = """
import torch


class Double(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)
"""
FILES = {"configuration_tiny.py": CONFIGURATION, "modeling_tiny.py": MODELING, "layers_tiny.py": LAYERS}
RECIPE = "lower-mx{weight=mxfp4,activation=none}"
X = torch.linspace(-1, 1, 128).view(2, 64)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The module of a model class with files of its own."""
    package = tmp_path / f"package_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(f"{package.name}.modeling_tiny", fromlist=["TinyModel"])
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def quantized(tiny):
    torch.manual_seed(0)
    model = tiny.TinyModel(tiny.TinyConfig()).eval()
    return mxcompile.quantize_and_compile(model, X, recipe=RECIPE, compile=False, include=["*"])


ELSEWHERE = """
import sys
import torch
import mxcompile
from mxcompile.errors import CheckpointError
from transformers import AutoModel
try:
    mxcompile.load(sys.argv[1])
except CheckpointError as error:
    print(error)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model.up.weight).__name__ == type(model.down.weight).__name__ == "MXWeight"
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.parametrize("format", [None, "compressed-tensors"])
def test_code_that_is_registered_for_it_is_saved(tiny, format, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.TinyModel, "_auto_class", None)
    monkeypatch.setattr(tiny.TinyConfig, "_auto_class", None)
    tiny.TinyModel.register_for_auto_class("AutoModel")
    tiny.TinyConfig.register_for_auto_class()
    model = quantized(tiny)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the code of")
        warnings.filterwarnings("ignore", message="this model is in float32")
        mxcompile.save(model, tmp_path / "out", format=format)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == set(FILES)
    assert not hasattr(model.config, "auto_map")
    if format is None:
        assert set(FILES) <= Checkpoint(tmp_path / "out").config.files.keys()


@pytest.mark.slow
def test_a_process_that_does_not_know_the_model_loads_it_with_its_code(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.TinyModel, "_auto_class", "AutoModel")
    monkeypatch.setattr(tiny.TinyConfig, "_auto_class", "AutoConfig")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = quantized(tiny)
    model.save_pretrained(tmp_path / "out")
    torch.save(X, tmp_path / "x.pt")
    said = assert_runs(ELSEWHERE, tmp_path / "out", tmp_path / "x.pt", tmp_path / "y.pt", tmp_path / "again")
    assert "its code lies in the folder. Read it, then load it with transformers.AutoModel.from_pretrained" in said
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), model(X))
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == set(FILES)


@pytest.mark.parametrize("format", [None, "compressed-tensors"])
@pytest.mark.filterwarnings("ignore:this model is in float32")
def test_a_class_that_is_imported_is_found_and_its_code_missed(tiny, format, tmp_path):
    model = quantized(tiny)
    with pytest.warns(
        UserWarning, match=r"the code of TinyConfig .* and TinyModel \(.*modeling_tiny\) is not saved"
    ) as caught:
        mxcompile.save(model, tmp_path / "out", format=format)
    assert {warning.filename for warning in caught} == {__file__}
    loaded = mxcompile.load(tmp_path / "out")
    assert type(loaded) is tiny.TinyModel
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_a_class_that_nobody_imports(tiny, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="the code of"):
        mxcompile.save(quantized(tiny), tmp_path / "out")
    monkeypatch.setattr("mxcompile.checkpoint.hf.models._subclasses", lambda _: iter(()))
    with pytest.raises(CheckpointError, match=r"holds a TinyModel, .*import the module that defines it, or build one"):
        mxcompile.load(tmp_path / "out")


def test_what_a_processor_writes_is_saved(tmp_path, local_model):
    from transformers import AutoTokenizer, ViTImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(local_model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool use": "{{ tools }}"}
    mxcompile.save(deployed("llama"), tmp_path / "out", tokenizer=tokenizer, processor=ViTImageProcessor())
    files = Checkpoint(tmp_path / "out").config.files
    assert {"chat_template.jinja", "additional_chat_templates/tool use.jinja"} <= files.keys()
    assert "preprocessor_config.json" in files
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    mxcompile.save(mxcompile.load(tmp_path / "out"), tmp_path / "out")


def test_a_file_that_a_load_would_refuse_is_refused_by_the_save(tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            (folder / "-x").touch()

    with pytest.raises(CheckpointError, match="'-x' is not a valid name for a file of a checkpoint"):
        mxcompile.save(deployed("llama"), tmp_path / "out", processor=Processor())
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with one model, `me/quantized`, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    revision = "0" * 40
    mxcompile.save(deployed("llama"), cache / "models--me--quantized" / "snapshots" / revision)
    (cache / "models--me--quantized" / "refs").mkdir()
    (cache / "models--me--quantized" / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def test_hub_ids(hub):
    assert_same(mxcompile.load("me/quantized"), deployed("llama"))
    assert Checkpoint("me/quantized").folder.parent.parent == hub / "models--me--quantized"
    with torch.no_grad():
        assert mxcompile.load("me/quantized")(**inputs("llama")).logits.isfinite().all()


@pytest.mark.parametrize("read", [mxcompile.load, Checkpoint])
def test_ids_that_are_nowhere(hub, read):
    with pytest.raises(CheckpointError, match=r"me/other is not a folder here, and no model with that id is in the"):
        read("me/other")
    with pytest.raises(CheckpointError, match="holds no saved model"):
        read("folder")
