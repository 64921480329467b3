"""`mxcompile eval`: the perplexity of a language model, and how far it is from another one.

The other is the float model that a recipe quantizes, or any model that splits text into the same tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mxcompile.api import quantize_and_compile
from mxcompile.cli import smollm2
from mxcompile.cli.model_source import load_model
from mxcompile.cli.progress import Progress, track, waiting
from mxcompile.cli.texts import help_text, read_text, token_ids
from mxcompile.diagnostics.evaluation import Evaluation, check_causal, evaluate, token_windows
from mxcompile.diagnostics.tables import table
from mxcompile.errors import InputError
from mxcompile.passes.recipes import RECIPES, as_pipeline
from mxcompile.tensor.modules import stored_bytes

_CALIBRATION_LENGTH, _CALIBRATION_BATCH = 512, 4
_EXAMPLE, _PROBE = 64, 16  # tokens: to trace with, to see whether a model is causal


@dataclass(frozen=True)
class Question:
    """What is to be compared, on what.

    model: a local path or hub id, SmolLM2-135M if None. against: likewise, what `model` is compared with.
    recipe: quantizes `model`, which is then compared with its float self.
    text, calibration_text: files as `read_text` takes them. None: Python's help topics; the same as `text`. If they are
        the same and the recipe calibrates, it does so on the first half and is evaluated on the second.
    length, windows: tokens of a window, number of windows (0: all of the text). calibration: windows of 512 tokens.
    """

    model: str | None = None
    against: str | None = None
    recipe: str | None = None
    text: Path | None = None
    length: int = 2048
    windows: int = 4
    calibration_text: Path | None = None
    calibration: int = 32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.recipe is not None and self.against is not None:
            raise InputError("give --recipe (against the float model) or --against (another model), not both")
        if self.recipe is None and self.calibration_text is not None:
            raise InputError("--calibration-text is for a --recipe")
        if self.recipe is not None:
            as_pipeline(self.recipe)
        _check_device(self.device)

    @property
    def calibrated(self) -> bool:
        """Whether the recipe makes use of calibration data."""
        return self.recipe is not None and as_pipeline(self.recipe).reads_calibration


@dataclass(frozen=True)
class Data:
    """Windows `[1, length]` to evaluate on and batches to calibrate with, each with what they are, in words."""

    text: str
    windows: list[Tensor]
    calibration: str | None = None
    batches: list[dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Answer:
    """The scores of a model, as the recipe quantized it if there is one, and against the reference if there is one.

    bytes: as stored.
    """

    data: Data
    model: str
    recipe: str | None
    bytes: int
    reference: str | None
    reference_bytes: int
    scores: Evaluation

    @property
    def label(self) -> str:
        """The model in a table."""
        if self.recipe is None:
            return self.model
        return self.recipe if self.recipe in RECIPES else "quantized"

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        scores, windows = self.scores, self.data.windows
        model = {"name": self.model, "bytes": self.bytes, "nll": scores.nll, "perplexity": scores.perplexity}
        other = {"nll": scores.reference_nll, "perplexity": scores.reference_perplexity}
        reference = {"name": self.reference, "bytes": self.reference_bytes} | other
        return {
            "model": model,
            "recipe": self.recipe,
            "reference": None if self.reference is None else reference,
            "kl": scores.kl,
            "top1": scores.top1,
            "text": self.data.text,
            "length": windows[0].shape[1],
            "windows": len(windows),
            "tokens": scores.tokens,
            "calibration": self.data.calibration,
        }


def compare(console: Console, question: Question) -> Answer:
    """Load, quantize if that is asked for, and evaluate; the console is told how far it is."""
    if question.recipe is not None:
        return quantize(console, question, question.recipe)[2]
    texts = _texts(question)
    name = question.model or smollm2.NAME
    model, tokenizer, data = _prepared(console, question, texts)
    if question.against is None:
        return _answer(console, data, question, model)
    reference, other_tokenizer = _load(console, question.against, question.device)
    if not torch.equal(token_ids(other_tokenizer, texts[0]), token_ids(tokenizer, texts[0])):
        raise InputError(f"{name} and {question.against} cannot be compared: they split the text into different tokens")
    _check_model(question.against, reference, data)
    return _answer(console, data, question, model, question.against, reference)


def quantize(console: Console, question: Question, recipe: str) -> tuple[nn.Module, Any, Answer]:
    """The model as the recipe quantized it, its tokenizer, and how it compares with its float self."""
    model, tokenizer, data = _prepared(console, question, _texts(question))
    quantized = _quantized(console, model, data, recipe)
    return quantized, tokenizer, _answer(console, data, question, quantized, question.model or smollm2.NAME, model)


def prepare(console: Console, question: Question) -> tuple[Any, Data]:
    """Load the model and cut the data."""
    model, _, data = _prepared(console, question, _texts(question))
    return model, data


def _prepared(console: Console, question: Question, texts: tuple[str, ...]) -> tuple[Any, Any, Data]:
    """Model, tokenizer, data."""
    model, tokenizer = _load(console, question.model, question.device)
    data = _data(question, *(token_ids(tokenizer, text) for text in texts))
    _check_model(question.model or smollm2.NAME, model, data)
    return model, tokenizer, data


def report(console: Console, answer: Answer) -> None:
    """Print a table, the reference first."""
    data, scores = answer.data, answer.scores
    console.print(f"{scores.tokens} tokens of {data.text}, {len(data.windows)} windows of {data.windows[0].shape[1]}")
    if data.calibration is not None:
        console.print(f"calibrated on {data.calibration}")
    compared = scores.reference_perplexity is not None
    rows = [[answer.label, f"{answer.bytes / 1e6:.1f}", f"{scores.perplexity:.3f}", "", "", ""]]
    if scores.reference_perplexity is not None:
        name = f"{answer.reference}{', float' if answer.recipe else ''}"
        size, before = f"{answer.reference_bytes / 1e6:.1f}", f"{scores.reference_perplexity:.3f}"
        change = scores.perplexity / scores.reference_perplexity - 1
        rows[0][3:] = f"{change:+.2%}", f"{scores.kl:.4f}", f"{scores.top1:.1%}"
        rows.insert(0, [name, size, before, "", "", ""])
    console.print(table(("model",), ("MB", "perplexity", "change", "KL", "top-1"), rows))
    if compared:
        console.print("KL: divergence from the first, nats a token; top-1: share of tokens predicted alike")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {device!r} ({str(error).splitlines()[0]})") from error


def _texts(question: Question) -> tuple[str, ...]:
    """To evaluate on; to calibrate with, if that is needed and another one."""
    text = help_text() if question.text is None else read_text(question.text)
    other = question.calibration_text
    if other is None or not question.calibrated:
        return (text,)
    same = question.text is not None and other.resolve() == question.text.resolve()
    return (text,) if same else (text, read_text(other))


def _data(question: Question, ids: Tensor, other: Tensor | None = None) -> Data:
    """What is cut from the token ids of the texts."""
    text = calibration_text = "Python's help topics" if question.text is None else question.text.name
    if not question.calibrated:
        return Data(text, _windows(text, ids, question.length, question.windows))
    if other is None:
        other, ids = ids.tensor_split(2)
        text, calibration_text = f"the second half of {text}", f"the first half of {text}"
    elif question.calibration_text is not None:
        calibration_text = question.calibration_text.name
    cut = _windows(calibration_text, other, _CALIBRATION_LENGTH, question.calibration)
    batches = [torch.cat(cut[i : i + _CALIBRATION_BATCH]) for i in range(0, len(cut), _CALIBRATION_BATCH)]
    return Data(
        text,
        _windows(text, ids, question.length, question.windows),
        f"{calibration_text}, {len(cut)} windows of {_CALIBRATION_LENGTH}",
        [{"input_ids": batch.to(question.device)} for batch in batches],
    )


def _windows(text: str, ids: Tensor, length: int, count: int) -> list[Tensor]:
    windows = list(token_windows(ids, length, count or None))
    if not windows:
        raise InputError(f"{text} has {ids.numel()} tokens, less than a window of {length}: give more text")
    return windows


def _load(console: Console, source: str | None, device: str) -> tuple[Any, Any]:
    console.print(f"loading {source or smollm2.NAME}", markup=False)
    with waiting(console, "loading"):
        model, tokenizer = load_model(source)
    return model.to(device), tokenizer


def _check_model(name: str, model: Any, data: Data) -> None:
    """Raise InputError if the windows are too long for a model, or if it is not causal."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = data.windows[0].shape[1]
    if isinstance(longest, int) and 0 < longest < length:
        raise InputError(f"{name} reads {longest} tokens at a time, not {length}: give --length {longest}")
    check_causal(model, data.windows[0][:, :_PROBE])


def _quantized(console: Console, model: nn.Module, data: Data, recipe: str) -> nn.Module:
    console.print(f"quantizing: {as_pipeline(recipe)}", markup=False)
    example = {"input_ids": data.windows[0][:, :_EXAMPLE].to(next(model.parameters()).device)}
    with Progress(console) as progress:
        return quantize_and_compile(
            model, example, recipe=recipe, calibration=data.batches, compile=False, instruments=[progress]
        )


def _answer(
    console: Console,
    data: Data,
    question: Question,
    model: nn.Module,
    reference_name: str | None = None,
    reference: nn.Module | None = None,
) -> Answer:
    scores = evaluate(model, track(console, data.windows, "evaluating"), reference)
    reference_bytes = 0 if reference is None else stored_bytes(reference)
    name = question.model or smollm2.NAME
    return Answer(data, name, question.recipe, stored_bytes(model), reference_name, reference_bytes, scores)
