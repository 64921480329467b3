"""What every test file may use: traced programs of the tiny models, one of them saved, one thread, a fixed seed.

The models themselves are plain functions in `models.py`.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch reads it: in graphs as small as those of tests, the cache of fake results costs a third of a trace.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import torch
from models import build, inputs
from shared_exports import SharedExports

from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace

LONG = (
    "test_experts.py",
    "test_quantize_files.py",
    "test_smollm2.py",
    "test_compile.py",
    "test_export.py",
    "test_cuda_experts.py",
    "test_resume.py",
    "test_readme.py",
    "test_guide.py",
    "test_split_graph.py",
    "test_memory.py",
    "test_triton_grouped_planes.py",
    "test_padded_and_unpadded.py",
    "test_allocate.py",
    "test_loop.py",
    "test_style.py",
    "test_folds.py",
    "test_report_page.py",
    "test_triton_packed_attention.py",
    "test_mapped_programs.py",
    "test_exact_tokens.py",
    "test_routers.py",
    "test_study.py",
    "test_adapters.py",
    "test_deploy.py",
    "test_cpu_experts.py",
    "test_quantize_cache.py",
    "test_torchrun.py",
    "test_bisect.py",
    "test_triton_expert_sums.py",
    "test_decode_step.py",
    "test_layers_once.py",
    "test_low_memory.py",
    "test_ranks.py",
)
# pytest listens to every logger that does not propagate; with a listener, torch writes down each graph and each stack.
logging.getLogger("torch.__trace").addHandler = lambda handler: None
export = importlib.import_module("mxcompile.graph.trace")
shared_exports = SharedExports(export._export)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: started last, one of them would keep a worker busy after all others are done."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of tracing itself export every model that they trace."""
    shared_exports.active = item.path.parent.name != "graph"


@pytest.fixture(autouse=True, scope="session")
def one_export_of_a_structure() -> Iterator[None]:
    """Models that differ in the values of their tensors share one `torch.export`: it takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_export", shared_exports)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors in tests are small: on a busy machine torch's threads wait for each other, at many times the cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Program]:
    """traced("llama") is a float Program of that model of `models.py`; every call gives a copy of one trace."""
    programs: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in programs:
            programs[name] = trace(build(name), inputs(name))
        return programs[name].copy()

    return get


@pytest.fixture(scope="session")
def local_model(tmp_path_factory) -> Path:
    """A tiny Llama with a word tokenizer, saved as a hub would hold it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["[UNK]", "[EOS]", "The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build("llama")
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    names = {"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
