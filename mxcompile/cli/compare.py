"""Load, quantize and evaluate a language model: what `eval`, `quantize`, `bisect` and `demo` have in common.

A model is compared with the float model that a recipe quantized, or with any model that has the same tokenizer.
"""

from collections.abc import Callable
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
from mxcompile.cli.texts import (
    CALIBRATION_LENGTH,
    HELP_TOPICS,
    calibration_batches,
    help_text,
    read_text,
    text_windows,
    token_ids,
)
from mxcompile.diagnostics.evaluation import Evaluation, check_causal, evaluate, start_tokens
from mxcompile.diagnostics.tables import table
from mxcompile.errors import InputError
from mxcompile.passes.recipes import RECIPES, as_pipeline
from mxcompile.tensor.devices import find_device
from mxcompile.tensor.modules import device_of, stored_bytes

_EXAMPLE, _CAUSAL_PROBE = 64, 16  # tokens: to trace with, to test causality with


@dataclass(frozen=True)
class EvalOptions:
    """The models to compare, and the text to compare them on.

    model: a local path or hub id, SmolLM2-135M if None. against: path or hub id of the model to compare with.
    recipe: quantizes `model`, which is then compared with the float model.
    text, calibration_text: files as `read_text` takes them. None: Python's help topics; the same as `text`. If both are
        the same and the recipe calibrates, it calibrates on the first half and is evaluated on the second.
    length, windows: tokens per window, number of windows (0: all). calibration: number of windows of 512 tokens.
    special_tokens: whether every window begins with what the tokenizer puts before a text, such as BOS.
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
    special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.recipe is not None and self.against is not None:
            raise InputError("use --recipe (against the float model) or --against (another model), not both")
        if self.recipe is None and self.calibration_text is not None:
            raise InputError("--calibration-text needs a --recipe")
        if self.recipe is not None:
            as_pipeline(self.recipe)
        find_device(self.device)

    @property
    def model_name(self) -> str:
        """The model in messages and tables."""
        return self.model or smollm2.NAME

    @property
    def calibrates(self) -> bool:
        """Whether the recipe reads calibration data."""
        return self.recipe is not None and as_pipeline(self.recipe).reads_calibration


@dataclass(frozen=True)
class EvalData:
    """Windows `[1, length]` to evaluate on and batches to calibrate with, each with a description of its text."""

    text: str
    windows: list[Tensor]
    calibration: str | None = None
    batches: list[dict[str, Tensor]] | None = None

    def example(self) -> dict[str, Tensor]:
        """What a model is traced with: the first tokens."""
        return {"input_ids": self.windows[0][:, :_EXAMPLE]}


@dataclass(frozen=True)
class Comparison:
    """The scores of a model, quantized if there is a recipe, and against the reference if there is one.

    bytes, reference_bytes: as stored.
    """

    data: EvalData
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


def compare(console: Console, options: EvalOptions) -> Comparison:
    """Load a model, quantize it if there is a recipe, and evaluate it; progress goes to the console."""
    if options.recipe is not None:
        return quantize_and_compare(console, options, options.recipe)[2]
    texts = _read_texts(options)
    model, tokenizer, data = _load_with_data(console, options, texts)
    if options.against is None:
        return score(console, options, data, model)
    reference, other_tokenizer = _load(console, options.against, options.device)
    same_ids = torch.equal(token_ids(other_tokenizer, texts[0]), token_ids(tokenizer, texts[0]))
    if not same_ids or (options.special_tokens and start_tokens(other_tokenizer) != start_tokens(tokenizer)):
        names = f"{options.model_name} and {options.against}"
        raise InputError(f"{names} cannot be compared: they split the text into different tokens")
    _check_model(options.against, reference, data)
    return score(console, options, data, model, options.against, reference)


def quantize_and_compare(
    console: Console,
    options: EvalOptions,
    recipe: str,
    check: Callable[[nn.Module], None] | None = None,
    resume: Path | None = None,
) -> tuple[nn.Module, Any, Comparison]:
    """The quantized model, its tokenizer, and its comparison with the float model.

    check: called with the model before the work; may raise. resume: a folder for finished parts.
    """
    model, tokenizer, data = load_with_data(console, options)
    if check is not None:
        check(model)
    quantized = quantize(console, model, data, recipe, resume=resume)
    return quantized, tokenizer, score(console, options, data, quantized, options.model_name, model)


def load_with_data(console: Console, options: EvalOptions) -> tuple[Any, Any, EvalData]:
    """The model, its tokenizer and the data; raises InputError if the model is not causal or the text is too short."""
    return _load_with_data(console, options, _read_texts(options))


def data_without_model(options: EvalOptions, tokenizer: Any) -> EvalData:
    """The data that `load_with_data` makes, without loading the model; raises InputError if the text is too short."""
    return _make_data(options, tokenizer, *(token_ids(tokenizer, text) for text in _read_texts(options)))


def quantize(
    console: Console,
    model: nn.Module,
    data: EvalData,
    recipe: str,
    *,
    dump: Path | None = None,
    probe: dict[str, Tensor] | None = None,
    resume: Path | None = None,
) -> nn.Module:
    """Quantize a model without compiling it, traced with the first tokens of the data, calibrated on its batches."""
    console.print(f"quantizing: {as_pipeline(recipe)}", markup=False)
    example = {"input_ids": data.example()["input_ids"].to(device_of(model))}
    with Progress(console) as progress:
        return quantize_and_compile(
            model,
            example,
            recipe=recipe,
            calibration=data.batches,
            dump=dump,
            probe=probe,
            compile=False,
            instruments=[progress],
            resume=resume,
        )


def score(
    console: Console,
    options: EvalOptions,
    data: EvalData,
    model: nn.Module,
    reference_name: str | None = None,
    reference: nn.Module | None = None,
) -> Comparison:
    """Evaluate a model on the data, against a reference if there is one."""
    scores = evaluate(model, track(console, data.windows, "evaluating"), reference)
    reference_bytes = 0 if reference is None else stored_bytes(reference)
    name, size = options.model_name, stored_bytes(model)
    return Comparison(data, name, options.recipe, size, reference_name, reference_bytes, scores)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print a table, the reference first."""
    data, scores = comparison.data, comparison.scores
    console.print(f"{scores.tokens} tokens of {data.text}, {len(data.windows)} windows of {data.windows[0].shape[1]}")
    if data.calibration is not None:
        console.print(f"calibrated on {data.calibration}")
    rows = [[comparison.label, f"{comparison.bytes / 1e6:.1f}", f"{scores.perplexity:.3f}", "", "", ""]]
    if scores.reference_perplexity is not None:
        name = f"{comparison.reference}{', float' if comparison.recipe else ''}"
        size, before = f"{comparison.reference_bytes / 1e6:.1f}", f"{scores.reference_perplexity:.3f}"
        change = scores.perplexity / scores.reference_perplexity - 1
        rows[0][3:] = f"{change:+.2%}", f"{scores.kl:.4f}", f"{scores.top1:.1%}"
        rows.insert(0, [name, size, before, "", "", ""])
    console.print(table(("model",), ("MB", "perplexity", "change", "KL", "top-1"), rows))
    if scores.reference_perplexity is not None:
        console.print("KL: divergence from the first model in nats per token; top-1: tokens predicted alike")


def _read_texts(options: EvalOptions) -> tuple[str, ...]:
    """The text to evaluate on, and the one to calibrate on if the recipe needs another."""
    text = help_text() if options.text is None else read_text(options.text)
    other = options.calibration_text
    if other is None or not options.calibrates:
        return (text,)
    same = options.text is not None and other.resolve() == options.text.resolve()
    return (text,) if same else (text, read_text(other))


def _load_with_data(console: Console, options: EvalOptions, texts: tuple[str, ...]) -> tuple[Any, Any, EvalData]:
    model, tokenizer = _load(console, options.model, options.device)
    data = _make_data(options, tokenizer, *(token_ids(tokenizer, text) for text in texts))
    _check_model(options.model_name, model, data)
    return model, tokenizer, data


def _make_data(options: EvalOptions, tokenizer: Any, ids: Tensor, other: Tensor | None = None) -> EvalData:
    """Windows and batches from the token ids `[tokens]` of the texts."""
    start = tokenizer if options.special_tokens else None
    name = calibration_name = HELP_TOPICS if options.text is None else options.text.name
    if not options.calibrates:
        return EvalData(name, text_windows(name, ids, options.length, options.windows, start))
    if other is None:
        other, ids = ids.tensor_split(2)
        name, calibration_name = f"the second half of {name}", f"the first half of {name}"
    elif options.calibration_text is not None:
        calibration_name = options.calibration_text.name
    calibration = text_windows(calibration_name, other, CALIBRATION_LENGTH, options.calibration, start)
    return EvalData(
        name,
        text_windows(name, ids, options.length, options.windows, start),
        f"{calibration_name}, {len(calibration)} windows of {CALIBRATION_LENGTH}",
        [{"input_ids": batch.to(options.device)} for batch in calibration_batches(calibration)],
    )


def _load(console: Console, source: str | None, device: str) -> tuple[Any, Any]:
    console.print(f"loading {source or smollm2.NAME}", markup=False)
    with waiting(console, "loading"):
        model, tokenizer = load_model(source)
    return model.to(device), tokenizer


def _check_model(name: str, model: Any, data: EvalData) -> None:
    """Raise InputError if the windows are too long for a model, or if it is not causal."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = data.windows[0].shape[1]
    if isinstance(longest, int) and 0 < longest < length:
        raise InputError(f"{name} takes at most {longest} tokens, not {length}: use --length {longest}")
    check_causal(model, data.windows[0][:, :_CAUSAL_PROBE])
