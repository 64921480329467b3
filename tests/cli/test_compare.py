"""`mxcompile eval`: its scores, the part of the text that it uses, its output and its errors."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from torch import Tensor
from typer.testing import CliRunner

import mxcompile
from mxcompile.calibration.data.windows import token_ids
from mxcompile.cli.app import app
from mxcompile.cli.compare import EvalOptions
from mxcompile.cli.model_source import load_model
from mxcompile.errors import InputError, MXCompileError

FLOAT32 = 1e-5  # relative, of a float32 log-softmax over 128 logits
WORDS = ["The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]
CALIBRATED = "smooth-quant | round-weights{format=mxint8} | lower-mx{weight=mxint8}"


@pytest.fixture
def text(tmp_path) -> Path:
    """2400 random words, one token each."""
    path = tmp_path / "words.txt"
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (2400,)).tolist()))
    return path


def evaluated(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def ids_of(model: Path, text: Path) -> Tensor:
    return token_ids(load_model(str(model))[1], text.read_text())


def nll_by_hand(model: Any, windows: list[Tensor]) -> float:
    """Mean negative log-likelihood of the next token, in float64, token by token."""
    losses = []
    for window in windows:
        with torch.no_grad():
            probabilities = model(input_ids=window).logits[0].double().softmax(-1)
        losses += [-probabilities[i - 1, window[0, i]].log().item() for i in range(1, window.shape[1])]
    return sum(losses) / len(losses)


def test_a_model_alone(local_model, text):
    answer = evaluated(local_model, "--text", text, "--length", 32, "--windows", 3)
    windows = list(mxcompile.token_windows(ids_of(local_model, text), 32, 3))
    assert answer["model"]["nll"] == pytest.approx(nll_by_hand(load_model(str(local_model))[0], windows), rel=FLOAT32)
    assert answer["model"]["name"] == str(local_model)
    assert (answer["text"], answer["length"], answer["windows"], answer["tokens"]) == ("words.txt", 32, 3, 3 * 31)
    assert answer["reference"] is answer["kl"] is answer["top1"] is answer["calibration"] is None


def test_all_of_the_text(local_model, text):
    assert evaluated(local_model, "--text", text, "--length", 500, "--windows", 0)["windows"] == 4


def test_one_half_of_the_text(local_model, text):
    second = list(mxcompile.token_windows(ids_of(local_model, text).split(1200)[1], 32, 2))
    answer = evaluated(local_model, "--text", text, "--length", 32, "--windows", 2, "--half", "second")
    assert answer["text"] == "the second half of words.txt"
    assert answer["model"]["nll"] == mxcompile.evaluate(load_model(str(local_model))[0], second).nll
    with pytest.raises(InputError, match="--half is first or second, not third"):
        EvalOptions(half="third")


def test_a_model_against_itself(local_model, text):
    answer = evaluated(local_model, "--against", local_model, "--text", text, "--length", 32)
    assert (answer["kl"], answer["top1"]) == (0.0, 1.0)
    assert answer["model"] == answer["reference"]
    assert answer["recipe"] is None


def test_a_recipe_against_float(local_model, text):
    answer = evaluated(local_model, "--recipe", "w4a8-mxint-quick", "--text", text, "--length", 32)
    model, _ = load_model(str(local_model))
    windows = list(mxcompile.token_windows(ids_of(local_model, text), 32, 4))
    quantized = mxcompile.quantize_and_compile(
        model, {"input_ids": windows[0]}, recipe="w4a8-mxint-quick", compile=False
    )
    expected = mxcompile.evaluate(quantized, windows, model)
    assert (answer["kl"], answer["top1"], answer["model"]["nll"]) == (expected.kl, expected.top1, expected.nll)
    assert answer["reference"]["nll"] == mxcompile.evaluate(model, windows).nll
    assert answer["kl"] > 0
    assert answer["recipe"] == "w4a8-mxint-quick"
    assert answer["model"]["bytes"] < answer["reference"]["bytes"]
    assert answer["calibration"] is None


@pytest.fixture
def calibrated_with(monkeypatch) -> list[Tensor]:
    """The calibration batches that a recipe gets."""
    batches: list[Tensor] = []

    def quantize(model: Any, example: Any, *, calibration: Any, **_: Any) -> Any:
        batches.extend(batch["input_ids"] for batch in calibration)
        return model

    monkeypatch.setattr("mxcompile.cli.compare.quantize_and_compile", quantize)
    return batches


@pytest.mark.parametrize("named", [False, True], ids=["no other text", "the same text"])
def test_one_text_is_halved(local_model, text, calibrated_with, named):
    same = ["--calibration-text", text] if named else []
    answer = evaluated(local_model, "--recipe", CALIBRATED, "--text", text, "--length", 32, *same)
    first, second = ids_of(local_model, text).split(1200)
    assert answer["text"] == "the second half of words.txt"
    assert answer["calibration"] == "the first half of words.txt, 2 windows of 512"
    assert torch.equal(torch.cat(calibrated_with).flatten(), first[:1024])
    windows = list(mxcompile.token_windows(second, 32, 4))
    assert answer["model"]["nll"] == mxcompile.evaluate(load_model(str(local_model))[0], windows).nll


def test_another_text_to_calibrate_with(local_model, text, tmp_path, calibrated_with):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "Berlin " * 600}) + "\n" for _ in range(6)))
    options = ["--text", text, "--calibration-text", other, "--calibration", 6, "--length", 32]
    answer = evaluated(local_model, "--recipe", CALIBRATED, *options)
    assert (answer["text"], answer["calibration"]) == ("words.txt", "other.jsonl, 6 windows of 512")
    assert [tuple(batch.shape) for batch in calibrated_with] == [(4, 512), (2, 512)]
    assert torch.cat(calibrated_with).unique().numel() == 1


def test_a_recipe_that_calibrates(local_model, text):
    answer = evaluated(local_model, "--recipe", CALIBRATED, "--text", text, "--length", 32)
    assert 0 < answer["kl"] < 0.1


def test_what_is_printed(local_model, text):
    def printed(*arguments: str) -> str:
        command = ["eval", str(local_model), "--text", str(text), "--length", "32", *arguments]
        result = CliRunner().invoke(app, command, env={"COLUMNS": "300"}, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    alone = printed()
    assert f"loading {local_model}\n" in alone
    assert "124 tokens of words.txt, 4 windows of 32\n" in alone
    assert "KL" not in alone
    compared = printed("--recipe", CALIBRATED)
    assert "124 tokens of the second half of words.txt, 4 windows of 32\n" in compared
    assert "calibrated on the first half of words.txt, 2 windows of 512\n" in compared
    assert "KL: divergence from the first model in nats per token" in compared
    assert re.search(r"^ \S+, float +[\d.]+ +[\d.]+ *$", compared, re.MULTILINE)
    assert re.search(r"^ quantized +[\d.]+ +[\d.]+ +[+-][\d.]+% +0\.\d+ +[\d.]+% *$", compared, re.MULTILINE)


def test_help_topics_if_no_text_is_named(local_model):
    answer = evaluated(local_model, "--length", 16, "--windows", 1)
    assert answer["text"] == "Python's help topics"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("MODEL --text nothing", "nothing cannot be read as text: No such file"),
        ("MODEL --text .", "cannot be read as text: Is a directory"),
        ("MODEL --text binary.txt", "binary.txt cannot be read as text: 'utf-8' codec"),
        ("MODEL --text lines.jsonl", "lines.jsonl, line 3 has no column messages, .*text or prompt: it has words"),
        ("MODEL --text chats.jsonl", "chats.jsonl: a text to evaluate on is .*, no chats"),
        ("MODEL --text empty.txt", "empty.txt has 0 tokens, fewer than a window of 2048: use more text"),
        ("MODEL --text words.txt --length 2401", "words.txt has 2400 tokens, fewer than a window of 2401"),
        ("MODEL --text words.txt --length 2100", "takes at most 2048 tokens, not 2100: use --length 2048"),
        ("MODEL --text words.txt --recipe w4a8-mxit", "unknown recipe 'w4a8-mxit': did you mean w4a8-mxint"),
        ("MODEL --recipe w4a8-mxint --against MODEL", "use --recipe .* or --against .*, not both"),
        ("MODEL --calibration-text words.txt", "--calibration needs a --recipe"),
        ("MODEL --calibration words.txt:3", "--calibration needs a --recipe"),
        ("MODEL --device tpu", "there is no device 'tpu' .*; this machine has: cpu"),
        (
            "./nothing",
            "nothing cannot be loaded .there is no such folder or file here; .*; use a hub id, a GGUF file, or",
        ),
    ],
)
def test_refused(local_model, text, monkeypatch, arguments, message):
    monkeypatch.chdir(text.parent)
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("lines.jsonl").write_text('{"text": "The"}\n\n{"words": "capital"}\n')
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "The"}]}')
    with pytest.raises(MXCompileError, match=message):
        evaluated(*arguments.replace("MODEL", str(local_model)).split())


def save(name: str, folder: Path, tokenizer: Any) -> Path:
    """A model of `models.py` with that tokenizer."""
    build(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_sees_what_it_predicts(local_model, text, tmp_path):
    bert = save("bert", tmp_path / "bert", load_model(str(local_model))[1])
    with pytest.raises(
        InputError, match="BertLMHeadModel is not a causal language model: its predictions depend on later tokens"
    ):
        evaluated(bert, "--text", text, "--length", 32)


def test_models_of_other_tokens(local_model, text, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    options = ["--against", local_model, "--text", text, "--length", 32]
    _, tokenizer = load_model(str(local_model))
    assert evaluated(save("gpt2", tmp_path / "gpt2", tokenizer), *options)["kl"] > 0
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    with pytest.raises(InputError, match="cannot be compared: they split the text into different tokens"):
        evaluated(local_model, "--against", save("gpt2", tmp_path / "other", other), *options[2:])


@pytest.fixture
def begins_with_dot(local_model, tmp_path) -> Path:
    """The model, with a tokenizer that puts a "." before a text."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "model"
    shutil.copytree(local_model, folder)
    tokenizer = load_model(str(folder))[1]
    dot = tokenizer.convert_tokens_to_ids(".")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=". $A", special_tokens=[(".", dot)])
    tokenizer.save_pretrained(folder)
    return folder


def test_windows_begin_as_the_tokenizer_begins_a_text(begins_with_dot, text, calibrated_with):
    """Those to evaluate on and to calibrate with; an option turns it off."""
    options = [begins_with_dot, "--text", text, "--length", 32, "--windows", 3]
    answers = evaluated(*options), evaluated(*options, "--no-special-tokens")
    model, tokenizer = load_model(str(begins_with_dot))
    ids = token_ids(tokenizer, text.read_text())
    for answer, start in zip(answers, (tokenizer, None), strict=True):
        windows = list(mxcompile.token_windows(ids, 32, 3, tokenizer=start))
        assert answer["model"]["nll"] == pytest.approx(mxcompile.evaluate(model, windows).nll, rel=FLOAT32)
    assert answers[0]["model"]["nll"] != answers[1]["model"]["nll"]
    evaluated(*options, "--recipe", CALIBRATED)
    assert {int(ids) for ids in torch.cat(calibrated_with)[:, 0]} == {tokenizer.convert_tokens_to_ids(".")}
