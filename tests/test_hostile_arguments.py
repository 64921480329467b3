"""Public calls with arguments of every wrong kind: they work, or raise an error of ours that names what is wrong."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig

import mxcompile
from mxcompile.errors import ArgumentError, MXCompileError

RECIPE = "w8a8-mxint-quick"
OTHERS = {  # no functions that take arguments: values, classes of values, modules, and what a user subclasses
    *("Bisection", "Evaluation", "Explanation", "MXWeight", "Miss", "Pass", "PassResult", "Program", "Request", "Rule"),
    *("alone", "observers", "recipes", "reference"),
}


class Anything:
    """An object of no use."""


class OneHot(nn.Module):
    """A language model in form: its logits are the tokens themselves."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=nn.functional.one_hot(input_ids, 64).float())


class Letters:
    """A tokenizer of single letters."""

    all_special_ids, added_tokens_decoder, eos_token_id = (), {}, None

    def __call__(self, text: str, **options: Any) -> Any:
        from transformers import BatchEncoding

        ids = [ord(letter) % 64 for letter in text]
        return BatchEncoding({"input_ids": torch.tensor([ids]) if "return_tensors" in options else ids})

    def __len__(self) -> int:
        return 64

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(64 + number) for number in ids)

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return list(map(self.decode, ids))


class Writer(nn.Linear):
    """A model that writes the letter A."""

    config = PretrainedConfig(vocab_size=64)
    generation_config = GenerationConfig()

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        return nn.functional.pad(input_ids, (0, max_new_tokens), value=1)


def hostile() -> list[Any]:
    """Values of every kind that somebody may pass by mistake."""
    return [
        *(None, True, -1, 0, 7, 10**30, 1.5, math.nan, math.inf, "", "nothing\0", "mxint4", "no/such/place", b"bytes"),
        *([], [None], [[1, 2], [3]], ["a"], {}, {"a": "b"}, {1: 2}, {"x": None}, (), (1,), set(), range(3), iter(())),
        *(Anything(), nn.Linear, nn.Linear(2, 2), lambda *_: None, Path("no/such/place"), torch.device("meta")),
        *(torch.zeros(0), torch.tensor(math.nan), torch.zeros(2, 64, device="meta"), torch.zeros(3, 3)),
        *(torch.zeros(2, 64, dtype=torch.complex64), torch.full((2, 64), math.nan)),
        *(torch.full((2, 4), -1), torch.full((2, 4), 2**40), torch.float8_e5m2, [torch.zeros(2, 3)], [{"x": None}]),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Some of the texts are good names of files, and others of data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """For each public call, a function and arguments that it accepts, all of them by name."""
    folder = tmp_path_factory.mktemp("hostile")
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    program = mxcompile.trace(model, x)
    lowered = mxcompile.recipes()[RECIPE].run(program.copy())
    deployed = mxcompile.deploy(lowered, model)
    mxcompile.save(deployed, folder / "saved")
    which = {"model": model, "example_inputs": x, "include": (), "exclude": ()}
    run = mxcompile.recipes()[RECIPE].run
    return {
        "quantize_and_compile": (
            mxcompile.quantize_and_compile,
            {
                **which,
                **{"recipe": RECIPE, "calibration": None, "probe": None, "compile": False, "overrides": None},
                **{"instruments": (), "resume": None, "allow_partial": False, "head": None},
            },
        ),
        "quantize_checkpoint": (
            mxcompile.quantize_checkpoint,
            {
                **{"source": folder / "none", "example_inputs": x, "out": folder / "in-files", "recipe": RECIPE},
                **{"calibration": None, "device": "cpu", "include": (), "exclude": (), "overrides": None, "head": None},
            },
        ),
        "quantize_files": (
            mxcompile.quantize_files,
            {"source": folder / "none", "out": folder / "from-files", "recipe": RECIPE, "device": "cpu"},
        ),
        "trace": (mxcompile.trace, {**which, "allow_partial": False}),
        "explain": (mxcompile.explain, {**which, "recipe": RECIPE, "device": None, "overrides": None}),
        "bisect": (mxcompile.bisect, {**which, "recipe": RECIPE, "kl": 9.0, "probe": None, "calibration": None}),
        "deploy": (mxcompile.deploy, {"program": lowered, "model": model, "check": True}),
        "save": (
            mxcompile.save,
            {"model": deployed, "path": folder / "new", "max_shard_size": "5GB", "format": None, "tokenizer": None},
        ),
        "load": (
            mxcompile.load,
            {"path": folder / "saved", "model": nn.Sequential(nn.Linear(64, 64)), "device": None, "verify": True},
        ),
        "export": (mxcompile.export, {"model": deployed, "example_inputs": x, "path": folder / "exported.pt2"}),
        "read_gguf": (mxcompile.read_gguf, {"path": folder / "none.gguf"}),
        "evaluate": (
            mxcompile.evaluate,
            {"model": OneHot(), "windows": torch.zeros(2, 4, dtype=torch.int64), "reference": None},
        ),
        "token_windows": (
            lambda **given_: next(mxcompile.token_windows(**given_), None),
            {"tokens": torch.arange(10), "length": 4, "count": None},
        ),
        "calibration_batches": (
            lambda **given_: mxcompile.calibration_batches(tokenizer=Letters(), **given_),
            {
                **{"source": ["a text of some letters"], "length": 4, "like": None, "windows": 2},
                **{"special_tokens": True, "device": "cpu"},
            },
        ),
        "generate_calibration": (
            lambda **given_: mxcompile.generate_calibration(tokenizer=Letters(), **given_),
            {"model": Writer(2, 2), "windows": 2, "length": 4, "seed": 0, "out": None},
        ),
        "WeightedBatch": (mxcompile.WeightedBatch, {"arguments": {"x": x}, "weight": 1.0}),
        "choose": (mxcompile.choose, {"program": program}),
        "MXCache": (
            mxcompile.MXCache,
            {
                **{"config": LlamaConfig(num_hidden_layers=2), "key": "mxint8", "value": None, "window": 0, "sink": 0},
                **{"max_length": 8, "rotate": False, "shift": False},
            },
        ),
        "prepare_training": (
            mxcompile.prepare_training,
            {
                **which,
                **{"recipe": RECIPE, "calibration": None, "include": (), "exclude": (), "allow_partial": False},
            },
        ),
        "finish_training": (
            mxcompile.finish_training,
            {"prepared": mxcompile.prepare_training(model, x, RECIPE)},
        ),
        "round_adapters": (mxcompile.round_adapters, {"model": deployed}),
        "merge_adapters": (mxcompile.merge_adapters, {"model": deployed, "batches": [x], "gptq": False}),
        "print_program": (mxcompile.print_program, {"program": program}),
        "print_changes": (mxcompile.print_changes, {"before": program, "after": lowered}),
        "apply_rules": (mxcompile.apply_rules, {"graph": program.copy().graph, "rules": ()}),
        "compile_module": (mxcompile.compile_module, {"module": nn.Linear(2, 2)}),
        "Pipeline": (mxcompile.Pipeline, {"passes": ()}),
        "Pipeline.parse": (mxcompile.Pipeline.parse, {"text": "rotate", "passes": ()}),
        "Pipeline.run": (run, {"program": program, "calibration": None, "instruments": (), "resume": None}),
        "Pipeline.with_overrides": (mxcompile.recipes()[RECIPE].with_overrides, {"overrides": {}}),
        "Measure": (mxcompile.Measure, {"probe": None}),
        "Ledger.load": (mxcompile.Ledger.load, {"path": folder}),
        "formats.integer": (mxcompile.formats.integer, {"bits": 4}),
        "formats.floating": (mxcompile.formats.floating, {"exponent_bits": 2, "mantissa_bits": 1}),
        "formats.parse_format": (mxcompile.formats.parse_format, {"text": "mxint4"}),
        "formats.as_format": (mxcompile.formats.as_format, {"fmt": "mxint4"}),
        "formats.parse_scale_rule": (mxcompile.formats.parse_scale_rule, {"text": "floor"}),
        "formats.activation_rule": (mxcompile.formats.activation_rule, {"fmt": "mxint4"}),
        "formats.with_block": (mxcompile.formats.MXINT4.with_block, {"block_size": 32}),
    }


def check(call: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """The call works or raises an error of ours, with a message."""
    try:
        call(**arguments)
    except MXCompileError as error:
        assert len(str(error)) > 20  # noqa: PT017 - an error is one of two good ends


def test_every_public_call_is_tried(calls):
    """Read from `__all__`, so that a new call must be added here."""
    assert {name.split(".")[0] for name in calls} | OTHERS == set(mxcompile.__all__)


NAMES = (
    *("quantize_and_compile", "quantize_checkpoint", "quantize_files"),
    *("trace", "explain", "bisect", "deploy", "save", "load", "export", "read_gguf"),
    *("calibration_batches", "generate_calibration", "WeightedBatch"),
    *("evaluate", "token_windows", "choose", "print_program", "print_changes", "apply_rules", "compile_module"),
    *("MXCache", "prepare_training", "finish_training", "merge_adapters", "round_adapters"),
    *("Pipeline", "Pipeline.parse", "Pipeline.run", "Pipeline.with_overrides", "Measure", "Ledger.load"),
    *("formats.integer", "formats.floating", "formats.parse_format", "formats.as_format"),
    *("formats.parse_scale_rule", "formats.activation_rule", "formats.with_block"),
)  # fmt: skip
each_call = pytest.mark.parametrize("name", NAMES)
quiet = pytest.mark.filterwarnings("ignore")
any_arguments = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quiet
@each_call
@settings(any_arguments, max_examples=6)
@given(data=st.data())
def test_a_wrong_argument_is_named(name, calls, data):
    call, good = calls[name]
    wrong = data.draw(st.sampled_from(sorted(good)))
    check(call, {**good, wrong: data.draw(st.sampled_from(hostile()))})


@quiet
@pytest.mark.slow
@each_call
def test_every_wrong_argument_is_named(name, calls):
    call, good = calls[name]
    for wrong in good:
        for value in hostile():
            check(call, {**good, wrong: value})


@quiet
@pytest.mark.slow
@each_call
@settings(any_arguments, max_examples=15)
@given(data=st.data())
def test_several_wrong_arguments(name, calls, data):
    call, good = calls[name]
    wrong = data.draw(st.sets(st.sampled_from(sorted(good)), min_size=1))
    check(call, {**good, **{each: data.draw(st.sampled_from(hostile())) for each in sorted(wrong)}})


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("trace", {"model": "gpt2"}, "trace: model is a str; give a torch.nn.Module"),
        (
            "trace",
            {"model": nn.Linear},
            r"trace: model is the class Linear, not called: write Linear\(\.\.\.\); give a t",
        ),
        ("deploy", {"program": nn.Linear}, "deploy: program is the class Linear; give a Program"),
        (
            "Pipeline.run",
            {"instruments": [mxcompile.Measure]},
            r"instruments holds something that is the class Measure, not called: write Measure\(\.\.\.\); give a S",
        ),
        (
            "Pipeline.with_overrides",
            {"overrides": 3},
            r"with_overrides: overrides is an int; give a Mapping\[str, MXFormat \| str \| None\]$",
        ),
        ("trace", {"include": 3}, r"trace: include is an int; give an Iterable\[str\]"),
        ("trace", {"include": [3]}, r"trace: include holds something that is an int; give an Iterable\[str\]"),
        ("deploy", {"program": None}, "deploy: program is a NoneType; give a Program"),
        ("save", {"path": 3}, "save: path is an int; give a str or a Path"),
        ("load", {"path": "a\0b"}, "load: path holds a null character; give a str or a Path"),
        ("formats.integer", {"bits": "4"}, "integer: bits is a str; give an int"),
    ],
)
def test_the_message(name, wrong, message, calls):
    call, good = calls[name]
    with pytest.raises(ArgumentError, match=message):
        call(**{**good, **wrong})
