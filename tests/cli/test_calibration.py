"""The options of commands for calibration data: what they mean together, and what does not go together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import mxcompile
from mxcompile.calibration.data.windows import token_ids
from mxcompile.cli.app import app
from mxcompile.cli.calibration import CalibrationOptions
from mxcompile.cli.model_source import load_model
from mxcompile.errors import InputError

WORDS = ["The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]
RECIPE = "smooth-quant | round-weights{format=mxint8} | lower-mx{weight=mxint8}"


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch) -> None:
    """The text to evaluate on, and others to calibrate on."""
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (2400,)).tolist()))
    Path("other.jsonl").write_text("".join(json.dumps({"text": "Berlin " * 600}) + "\n" for _ in range(6)))
    Path("task.txt").write_text("The capital of France is\nParis .\n")
    Path("chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Paris"}]}))


@pytest.fixture
def calibrated_with(monkeypatch) -> list[mxcompile.WeightedBatch]:
    """The calibration batches that a recipe gets."""
    batches: list[mxcompile.WeightedBatch] = []

    def quantize(model: Any, example: Any, *, calibration: Any, **_: Any) -> Any:
        batches.extend(calibration)
        return model

    monkeypatch.setattr("mxcompile.cli.compare.quantize_and_compile", quantize)
    return batches


def calibrated(model: Path, *options: object) -> str:
    """What the calibration data are called, after an evaluation."""
    command = ["eval", model, "--recipe", RECIPE, "--text", "words.txt", "--length", 32, *options, "--json"]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["calibration"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "the first half of words.txt, 2 windows of 512"),
        (["--calibration", 1], "the first half of words.txt, 1 windows of 512"),
        (["--calibration", "words.txt"], "the first half of words.txt, 2 windows of 512"),
        (["--calibration", "other.jsonl"], "other.jsonl, 7 windows of 512"),
        (["--calibration", "other.jsonl:3"], "other.jsonl, 3 windows of 512"),
        (["--calibration-text", "other.jsonl", "--calibration", 6], "other.jsonl, 6 windows of 512"),
        (["--calibration", "other.jsonl:9", "--calibration-length", 64], "other.jsonl, 9 windows of 64"),
        (
            ["--calibration", "other.jsonl:21", "--calibration-length", "128,32"],
            "other.jsonl, 17 windows of 32, 4 of 128",
        ),
        (["--calibration", "other.jsonl:4", "--calibration-like", "task.txt"], "other.jsonl, 2 windows of 2, 2 of 5"),
    ],
)
def test_what_is_calibrated_on(local_model, calibrated_with, options, expected):
    assert calibrated(local_model, *options) == expected


def test_batches_are_those_of_the_python_call(local_model, calibrated_with):
    calibrated(local_model, "--calibration", "other.jsonl:21", "--calibration-length", "128,32")
    tokenizer = load_model(str(local_model))[1]
    expected = mxcompile.calibration_batches("other.jsonl:21", tokenizer, length=(128, 32))
    assert [batch.weight for batch in calibrated_with] == [batch.weight for batch in expected]
    pairs = zip(calibrated_with, expected, strict=True)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)


def test_the_model_writes_its_own(local_model, calibrated_with):
    """It is saved, and read again it is the same; then all of the text is there to evaluate on."""
    options = ["--calibration-length", 16]
    written = calibrated(local_model, "--calibration", 4, "--calibration-self", "own.jsonl", *options)
    assert written == "the model's own text, 4 windows of 16"
    read = calibrated(local_model, "--calibration", "own.jsonl:4", *options)
    again = calibrated(local_model, "--calibration", 4, "--calibration-self", "own.jsonl", *options)
    assert read == again == "own.jsonl, 4 windows of 16"
    one, *others = (batch["input_ids"] for batch in calibrated_with)
    assert [torch.equal(one, other) for other in others] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--calibration 0", "--calibration 0: the number of windows is at least 1"),
        ("--calibration 3", "the first half of words.txt has 1200 tokens: 2 windows, not 3; ask for 2"),
        ("--calibration other.jsonl --calibration-text words.txt", "--calibration-text and --calibration both name"),
        (
            "--calibration other.jsonl --calibration-self a.jsonl",
            "--calibration-self and --calibration other.jsonl both",
        ),
        ("--calibration-self own.txt", "own.txt: the model's own text is saved in a .jsonl file"),
        ("--calibration-length 12,x", "--calibration-length 12,x: write tokens of a window, or several: 128,512,2048"),
        ("--calibration-length 12 --calibration-like task.txt", "both say how long the windows are: leave out one"),
        ("--calibration-length 4096 --calibration x.jsonl", "x.jsonl cannot be read: there is no such file or folder"),
        ("--calibration chats.jsonl", "chats.jsonl, document 1 is a chat, and the tokenizer has no chat template"),
        (
            "--calibration other.jsonl:1 --calibration-length 2100",
            "takes at most 2048 tokens, not 2100: use --calibration",
        ),
    ],
)
def test_refused(local_model, options, message):
    with pytest.raises(InputError, match=message):
        calibrated(local_model, *options.split())


def test_options_in_words():
    parsed = CalibrationOptions.parse("owner/name:train:7", None, "512,128", None, None)
    assert (parsed.source.name, parsed.source.split, parsed.windows) == ("owner/name", "train", 7)
    assert (parsed.length, parsed.named) == ((512, 128), True)
    assert not CalibrationOptions.parse("7", None, None, None, None).named
    assert CalibrationOptions() == CalibrationOptions.parse(None, None, None, None, None)


def test_the_halves_of_a_text_keep_their_tokens(local_model, calibrated_with):
    calibrated(local_model)
    ids: Tensor = token_ids(load_model(str(local_model))[1], Path("words.txt").read_text())
    (batch,) = calibrated_with
    assert torch.equal(batch["input_ids"].flatten(), ids[:1024])
    assert batch.weight == 1.0
