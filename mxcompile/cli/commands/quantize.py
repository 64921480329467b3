"""The command `mxcompile quantize`: its options, what it prints, and the checkpoint it writes."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from mxcompile.calibration.ranks.process_group import is_first, launched, launched_group
from mxcompile.checkpoint import check_destination, check_model, save
from mxcompile.cli.arguments import (
    Calibration,
    CalibrationLength,
    CalibrationLike,
    CalibrationSelf,
    CalibrationText,
    Device,
    Format,
    Json,
    Length,
    Model,
    SpecialTokens,
    TextFile,
)
from mxcompile.cli.calibration import CalibrationOptions
from mxcompile.cli.commands.low_memory import LowMemoryOptions, quantize_low_memory
from mxcompile.cli.commands.model_free import ModelFreeOptions, quantize_model_free
from mxcompile.cli.commands.quantize_options import (
    Bits,
    Cache,
    DryRun,
    Dump,
    Exclude,
    Include,
    LowMemory,
    Memory,
    MinRecovery,
    ModelFree,
    Resume,
    Scratch,
    Workers,
)
from mxcompile.cli.compare import Comparison, EvalOptions, print_comparison, quantize_and_compare, quantize_with_others
from mxcompile.cli.console import messages, print_json, quoted, results
from mxcompile.cli.interruption import check_apart, interruption_explained
from mxcompile.cli.progress import waiting
from mxcompile.diagnostics.dump import Dump as DumpFolder
from mxcompile.diagnostics.evaluation import Metric
from mxcompile.errors import InputError, RecoveryError
from mxcompile.passes.recipes import QUICK, as_pipeline, weight_formats, with_bits, with_cache


def quantize(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="folder for the checkpoint, or a .gguf file")] = Path("out/quantized"),
    format: Format = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline")] = QUICK,
    bits: Bits = None,
    cache: Cache = None,
    min_recovery: MinRecovery = None,
    metric: Annotated[Metric, typer.Option(help="the measure of recovery")] = Metric.TOP1,
    force: Annotated[bool, typer.Option("--force", help="write it anyway")] = False,
    text: TextFile = None,
    length: Length = 2048,
    windows: Annotated[int, typer.Option(min=0, help="number of windows to compare on; 0 for the whole text")] = 4,
    calibration: Calibration = None,
    calibration_text: CalibrationText = None,
    calibration_length: CalibrationLength = None,
    calibration_like: CalibrationLike = None,
    calibration_self: CalibrationSelf = None,
    special_tokens: SpecialTokens = True,
    device: Device = "cpu",
    resume: Resume = None,
    dump: Dump = None,
    low_memory: LowMemory = False,
    memory: Memory = 1.0,
    scratch: Scratch = None,
    model_free: ModelFree = False,
    workers: Workers = 1,
    dry_run: DryRun = False,
    include: Include = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Quantize a language model, compare it with the float model, and write it to a folder or a GGUF file.

    Recovery compares the quantized with the float model: the fraction of tokens predicted alike (top1), the float
    perplexity over the quantized one (perplexity), or exp(-KL) (kl).

    --bits 4.5: weights get formats of 4, 6 and 8 bits, 4.5 with scales on average, by what each costs the model.
    --cache mxint8: keys and values of generation get a format, too, and recovery counts what that loses.
    --low-memory: weights are read from the model's files when they are used, and written to files when they change.
    The result has the same bytes. Finished parts are always kept until it is written (--resume names their folder).
    Started by torchrun, several processes share the work (also with --low-memory); the first compares, prints, writes.

    --model-free: the model is never in memory, nothing is compared, recipes round to nearest; a plan is printed first.

    --json: as for eval, and "recovery", "metric", "out" (null if nothing is written), "allocation" (with --bits; as in
    ledger.json); --model-free: {"source", "module", "recipe", "notes", "before", "after", "out", "tensors": [{"name",
    "shape", "format", "input", "reason", "before", "after"}]}, in bytes; --low-memory: {"model", "recipe",
    "calibration", "out"}.
    """
    if model_free:
        _check_model_free(min_recovery, resume, bits, cache, dump)
        chosen = ModelFreeOptions(out, format, recipe, device, workers, dry_run, include or (), exclude or ())
        return _without_model(model, chosen, as_json)
    if dry_run or workers > 1 or include or exclude:
        raise InputError("--dry-run, --workers, --include and --exclude are options of --model-free: give that too")
    recipe = _changed(recipe, bits, cache)
    check_destination(out, format)
    check_apart(out, resume=resume, dump=dump)
    sources = calibration, calibration_text, calibration_length, calibration_like, calibration_self
    data = CalibrationOptions.parse(*sources)
    options = EvalOptions(model, None, recipe, text, length, windows, data, device, special_tokens)
    if low_memory:
        _check_low_memory(out, format, min_recovery)
        return quantize_low_memory(options, recipe, LowMemoryOptions(out, resume, scratch, memory, dump), as_json)
    if scratch is not None:
        raise InputError("--scratch is an option of --low-memory: give that too")
    saving = SaveOptions(out, format, min_recovery, metric, force)
    return _compare_and_save(options, recipe, resume, dump, saving, as_json)


def _changed(recipe: str, bits: float | None, cache: str | None) -> str:
    """The recipe with the passes that --bits and --cache add."""
    recipe = recipe if bits is None else str(with_bits(recipe, bits))
    return recipe if cache is None else str(with_cache(recipe, cache))


def _without_model(model: str | None, chosen: ModelFreeOptions, as_json: bool) -> None:
    with interruption_explained(messages(), chosen.out):
        quantize_model_free(model, chosen, as_json)


@dataclass(frozen=True)
class SaveOptions:
    """Where to save a model, and how good it must be for that."""

    out: Path
    format: str | None
    min_recovery: float | None
    metric: Metric
    force: bool


def _compare_and_save(
    options: EvalOptions, recipe: str, resume: Path | None, dump: Path | None, saving: SaveOptions, as_json: bool
) -> None:
    """Quantize in memory, compare with the float model, and save the result if it is good enough."""
    if dump is not None:
        DumpFolder(dump)  # refuses a place before the model is loaded
    out, format, metric = saving.out, saving.format, saving.metric
    weights = weight_formats(as_pipeline(recipe))
    with interruption_explained(messages(), resume), launched_group(options.device) as own_device:
        options = replace(options, device=own_device)
        if not is_first():
            quantize_with_others(messages(), options, recipe, resume, dump)
            return
        quantized, tokenizer, comparison = quantize_and_compare(
            messages(), options, recipe, lambda loaded: check_model(out, loaded, weights, format), resume, dump
        )
    _report_dump(dump)
    recovery = comparison.scores.recovery(metric)
    enough = saving.min_recovery is None or recovery >= saving.min_recovery
    if enough or saving.force:
        with interruption_explained(messages(), resume):
            save_model(quantized, out, tokenizer, format)
    _report(comparison, metric, saving.min_recovery, out if enough or saving.force else None, as_json)


def _report_dump(dump: Path | None) -> None:
    if dump is not None:
        messages().print(f"what each pass did is in {dump} (mxcompile show {quoted(dump)})", markup=False)


def _report(
    comparison: Comparison, metric: Metric, min_recovery: float | None, written: Path | None, as_json: bool
) -> None:
    """Print the comparison and where the model is written; raises RecoveryError if it is written nowhere."""
    recovery = comparison.scores.recovery(metric)
    if as_json:
        numbers = {"recovery": recovery, "metric": str(metric), "out": None if written is None else str(written)}
        print_json(comparison.record() | numbers)
    else:
        print_comparison(results(), comparison)
    below = min_recovery is not None and recovery < min_recovery
    verdict = f"recovery ({metric}) {recovery:.3f}" + (f", below {min_recovery}" if below else "")
    if written is None:
        raise RecoveryError(f"{verdict}: nothing is written; try another recipe, mxcompile bisect, or --force")
    screen = messages() if as_json else results()
    screen.print(f"{verdict}; written to {written} (mxcompile generate {quoted(written)} --prompt ...)", markup=False)


def _check_model_free(
    min_recovery: float | None, resume: Path | None, bits: float | None, cache: str | None, dump: Path | None
) -> None:
    """Raise InputError for options that --model-free does not have, and for several processes."""
    if launched():
        raise InputError(
            "--model-free runs in one process: start it without torchrun; --workers says how many tensors are in work"
        )
    for name, option, why in (("bits", bits, "choose formats"), ("cache", cache, "find its keys and values")):
        if option is not None:
            raise InputError(
                f"--{name} runs the model to {why}, which --model-free does not load: leave one of them out"
            )
    if min_recovery is not None:
        raise InputError("--min-recovery compares models, which --model-free does not load: leave one of them out")
    if dump is not None:
        raise InputError(
            "--model-free has no graph to write to --dump (--dry-run prints its plan): leave one of them out"
        )
    if resume is not None:
        raise InputError("--model-free keeps finished files in --out and goes on from there: leave --resume out")


def _check_low_memory(out: Path, format: str | None, min_recovery: float | None) -> None:
    """Raise InputError for options that --low-memory does not have."""
    if min_recovery is not None:
        raise InputError("--min-recovery compares models, which --low-memory does not load: leave one of them out")
    if format not in (None, "mxcompile") or out.suffix == ".gguf":
        raise InputError(
            "--low-memory writes mxcompile's own format: leave --format out, and convert the result (mxcompile convert)"
        )


def save_model(model: nn.Module, out: Path, tokenizer: Any, format: str | None) -> None:
    """Save a model; what another program will do otherwise is printed as a message."""
    with waiting(messages(), "writing") as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        save(model, out, tokenizer=tokenizer, format=format, progress=report)
    for warning in caught:
        messages().print(f"warning: {warning.message}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(quantize)
