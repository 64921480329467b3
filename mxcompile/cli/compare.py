"""Load, quantize and evaluate a language model: what `eval`, `quantize`, `bisect` and `demo` have in common.

A model is compared with the float model that a recipe quantized, or with any model that has the same tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mxcompile.api import quantize_and_compile
from mxcompile.calibration.data.sources import Documents
from mxcompile.calibration.data.windows import start_tokens, token_ids
from mxcompile.calibration.ranks.process_group import joined
from mxcompile.cli import smollm2
from mxcompile.cli.calibration import CalibrationOptions
from mxcompile.cli.model_source import load_model
from mxcompile.cli.progress import Progress, track, waiting
from mxcompile.cli.texts import HELP_TOPICS, help_text, read_text, text_windows
from mxcompile.diagnostics.evaluation import Evaluation, check_causal, evaluate, evaluate_several
from mxcompile.diagnostics.ledger import plain
from mxcompile.diagnostics.tables import table
from mxcompile.errors import InputError
from mxcompile.graph.inputs import WeightedBatch
from mxcompile.graph.program import Program
from mxcompile.graph.records import Allocation, PassRecord
from mxcompile.passes.recipes import RECIPES, as_pipeline
from mxcompile.pipeline.interfaces import Instrument, PipelineStep
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.devices import find_device
from mxcompile.tensor.modules import device_of, stored_bytes

_HALVES = ("first", "second")
_EXAMPLE, _CAUSAL_PROBE = 64, 16  # tokens: to trace with, to test causality with


@dataclass(frozen=True)
class EvalOptions:
    """The models to compare, and the text to compare them on.

    model: a local path or hub id, SmolLM2-135M if None. against: path or hub id of the model to compare with.
    recipe: quantizes `model`, which is then compared with the float model.
    text: a file as `read_text` takes it. None: Python's help topics.
    length, windows: tokens per window, number of windows (0: all).
    calibration: the data for a recipe that calibrates. If they are not named, or named the same file, it calibrates on
        the first half of the text and is evaluated on the second.
    special_tokens: whether every window begins with what the tokenizer puts before a text, such as BOS.
    half: evaluate on the "first" or "second" half of the text's tokens alone; calibration data must then be named.
    """

    model: str | None = None
    against: str | None = None
    recipe: str | Pipeline | None = None
    text: Path | None = None
    length: int = 2048
    windows: int = 4
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    device: str = "cpu"
    special_tokens: bool = True
    half: str | None = None

    def __post_init__(self) -> None:
        if self.recipe is not None and self.against is not None:
            raise InputError("use --recipe (against the float model) or --against (another model), not both")
        if self.recipe is None and self.calibration.named:
            raise InputError("--calibration needs a --recipe")
        if self.half not in (None, *_HALVES):
            raise InputError(f"--half is first or second, not {self.half}")
        if self.recipe is not None:
            as_pipeline(self.recipe)
        own_text = self.calibration.source is None or self.calibration.same_file(self.text)
        if self.half is not None and self.calibrates and own_text:
            raise InputError("calibration on the first half of the text leaves its second half: name other data")
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
    batches: list[WeightedBatch] | None = None

    def example(self) -> dict[str, Tensor]:
        """What a model is traced with: the first tokens."""
        return {"input_ids": self.windows[0][:, :_EXAMPLE]}


@dataclass(frozen=True)
class Comparison:
    """The scores of a model, quantized if there is a recipe, and against the reference if there is one.

    bytes, reference_bytes: as stored. allocation: the formats that a pass of the recipe has chosen under a budget.
    """

    data: EvalData
    model: str
    recipe: str | None
    bytes: int
    reference: str | None
    reference_bytes: int
    scores: Evaluation
    allocation: Allocation | None = None

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
        } | ({} if self.allocation is None else {"allocation": plain(asdict(self.allocation))})


def compare(console: Console, options: EvalOptions) -> Comparison:
    """Load a model, quantize it if there is a recipe, and evaluate it; progress goes to the console."""
    if options.recipe is not None:
        return quantize_and_compare(console, options, str(options.recipe))[2]
    text, documents = _read_texts(options)
    model, tokenizer, data = _load_with_data(console, options, text, documents)
    if options.against is None:
        return score(console, options, data, model)
    reference, other_tokenizer = _load(console, options.against, options.device)
    same_ids = torch.equal(token_ids(other_tokenizer, text), token_ids(tokenizer, text))
    if not same_ids or (options.special_tokens and start_tokens(other_tokenizer) != start_tokens(tokenizer)):
        names = f"{options.model_name} and {options.against}"
        raise InputError(f"{names} cannot be compared: they split the text into different tokens")
    check_data(options.against, reference, data)
    return score(console, options, data, model, options.against, reference)


def quantize_and_compare(
    console: Console,
    options: EvalOptions,
    recipe: str,
    check: Callable[[nn.Module], None] | None = None,
    resume: Path | None = None,
    dump: Path | None = None,
) -> tuple[nn.Module, Any, Comparison]:
    """The quantized model, its tokenizer, and its comparison with the float model.

    check: called with the model before the work; may raise. resume, dump: folders, see `quantize_and_compile`.
    """
    model, tokenizer, data = load_with_data(console, options)
    if check is not None:
        check(model)
    chosen = _Allocations()
    quantized = quantize(console, model, data, recipe, dump=dump, resume=resume, watchers=[chosen])
    comparison = score(console, options, data, quantized, options.model_name, model)
    return quantized, tokenizer, replace(comparison, allocation=chosen.last)


class _Allocations(Instrument):
    """last: the formats that the last pass that chose any has chosen under a budget."""

    def __init__(self) -> None:
        self.last: Allocation | None = None

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Keep what a pass has chosen."""
        self.last = record.allocation or self.last


def quantize_with_others(
    console: Console, options: EvalOptions, recipe: str, resume: Path | None = None, dump: Path | None = None
) -> None:
    """The share of one of several processes in `quantize_and_compare` of the first one."""
    model, _, data = load_with_data(console, options)
    quantize(console, model, data, recipe, dump=dump, resume=resume)


def load_with_data(console: Console, options: EvalOptions) -> tuple[Any, Any, EvalData]:
    """The model, its tokenizer and the data; raises InputError if the model is not causal or the text is too short."""
    return _load_with_data(console, options, *_read_texts(options))


def data_without_model(options: EvalOptions, tokenizer: Any) -> EvalData:
    """The data that `load_with_data` makes, without loading the model; raises InputError if the text is too short."""
    text, documents = _read_texts(options)
    if options.calibrates and options.calibration.own is not None and documents is None:
        raise InputError("--calibration-self needs the model in memory: use --calibration FILE")
    return _make_data(options, tokenizer, token_ids(tokenizer, text), documents)


def quantize(
    console: Console,
    model: nn.Module,
    data: EvalData,
    recipe: str,
    *,
    dump: Path | None = None,
    probe: dict[str, Tensor] | None = None,
    resume: Path | None = None,
    watchers: Sequence[Instrument] = (),
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
            instruments=[progress, *watchers],
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
    recipe = None if options.recipe is None else str(options.recipe)
    return Comparison(data, name, recipe, size, reference_name, reference_bytes, scores)


def score_recipes(
    console: Console, options: EvalOptions, data: EvalData, quantized: Mapping[str, nn.Module], reference: nn.Module
) -> dict[str, Comparison]:
    """`score` of a model that recipes quantized, by the recipe, against the float model, which runs once for all."""
    windows = track(console, data.windows, "evaluating")
    scores = evaluate_several(list(quantized.values()), windows, reference)
    name, size = options.model_name, stored_bytes(reference)
    return {
        recipe: Comparison(data, name, recipe, stored_bytes(model), name, size, each)
        for (recipe, model), each in zip(quantized.items(), scores, strict=True)
    }


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


def _read_texts(options: EvalOptions) -> tuple[str, Documents | None]:
    """The text to evaluate on, and what to calibrate on if the recipe needs something else that is in a file."""
    text = help_text() if options.text is None else read_text(options.text)
    if not options.calibrates or options.calibration.same_file(options.text):
        return text, None
    return text, options.calibration.read()


def _load_with_data(
    console: Console, options: EvalOptions, text: str, documents: Documents | None
) -> tuple[Any, Any, EvalData]:
    model, tokenizer = _load(console, options.model, options.device)
    if options.calibrates and options.calibration.own is not None:
        with joined(torch.device(options.device)) as ranks:
            documents = _own_text(console, options, model, tokenizer, documents) if ranks.first else None
            documents = ranks.from_first(documents)
    data = _make_data(options, tokenizer, token_ids(tokenizer, text), documents)
    check_data(options.model_name, model, data)
    return model, tokenizer, data


def _own_text(
    console: Console, options: EvalOptions, model: nn.Module, tokenizer: Any, documents: Documents | None
) -> Documents:
    """What the model writes to calibrate on, or has written: then documents are those of its file."""
    if documents is None:
        return options.calibration.write_own(console, model, tokenizer, options.special_tokens)
    console.print(f"{options.calibration.own} is there already: it is read, and the model writes no text", markup=False)
    return Documents(documents.label, list(documents.items))


def _make_data(options: EvalOptions, tokenizer: Any, ids: Tensor, documents: Documents | None) -> EvalData:
    """Windows and batches from the token ids `[tokens]` of the text, and from the documents to calibrate on."""
    start = tokenizer if options.special_tokens else None
    if options.half is not None:
        ids = ids.tensor_split(2)[_HALVES.index(options.half)]
    name = HELP_TOPICS if options.text is None else options.text.name
    name = name if options.half is None else f"the {options.half} half of {name}"
    if not options.calibrates:
        return EvalData(name, text_windows(name, ids, options.length, options.windows, start))
    if documents is None:
        first, ids = ids.tensor_split(2)
        name, documents = f"the second half of {name}", Documents(f"the first half of {name}", [first])
    calibration = options.calibration.batches(documents, tokenizer, options.special_tokens, options.device)
    return EvalData(name, text_windows(name, ids, options.length, options.windows, start), *calibration)


def _load(console: Console, source: str | None, device: str) -> tuple[Any, Any]:
    console.print(f"loading {source or smollm2.NAME}", markup=False)
    with waiting(console, "loading"):
        model, tokenizer = load_model(source)
    return model.to(device), tokenizer


def check_data(name: str, model: Any, data: EvalData) -> None:
    """Raise InputError if the windows are too long for a model, or if it is not causal."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    calibrated = max((batch["input_ids"].shape[1] for batch in data.batches or ()), default=0)
    for option, length in (("--length", data.windows[0].shape[1]), ("--calibration-length", calibrated)):
        if isinstance(longest, int) and 0 < longest < length:
            raise InputError(f"{name} takes at most {longest} tokens, not {length}: use {option} {longest}")
    check_causal(model, data.windows[0][:, :_CAUSAL_PROBE])
