"""`mxcompile quantize FOLDER --model-free`: print what will be done to each tensor, do it, and say what was done."""

import math
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mxcompile.cli.console import messages, print_json, quoted, results
from mxcompile.cli.progress import Progress
from mxcompile.diagnostics.tables import table
from mxcompile.errors import InputError
from mxcompile.model_free.plan import FilesPlan, TensorPlan
from mxcompile.model_free.quantize_files import quantize_files


@dataclass(frozen=True)
class ModelFreeOptions:
    """Options of the command; include, exclude: name patterns."""

    out: Path
    format: str | None
    recipe: str
    device: str
    workers: int
    dry_run: bool
    include: Iterable[str] = ()
    exclude: Iterable[str] = ()


def quantize_model_free(source: str | None, options: ModelFreeOptions, as_json: bool) -> None:
    """Run the command. as_json: the plan is printed as one line of JSON at the end, and not before."""
    if source is None or source.lower() == "smollm2":
        raise InputError("--model-free reads a folder with safetensors, or a hub id: name one")
    screen = messages() if as_json else results()
    with Progress(messages(), first="reading the files' headers") as shown, _warnings_printed():

        def planned(plan: FilesPlan) -> None:
            shown.report("planned")
            if not as_json:
                print_plan(screen, plan)

        plan = quantize_files(
            source,
            options.out,
            recipe=options.recipe,
            device=options.device,
            workers=options.workers,
            format=options.format,
            include=options.include,
            exclude=options.exclude,
            dry_run=options.dry_run,
            planned=planned,
            progress=lambda done, total: shown.report("tensors", done, total),
        )
    if as_json:
        print_json(plan.record() | {"out": None if options.dry_run else str(options.out)})
    if options.dry_run:
        screen.print("nothing is written (--dry-run)")
    else:
        screen.print(f"written to {options.out} (mxcompile generate {quoted(options.out)} --prompt ...)", markup=False)


def print_plan(console: Console, plan: FilesPlan) -> None:
    """Print a table of all tensors, those that differ in a number of their name alone in one line."""
    tensors = plan.tensors
    before, after = (sum(sizes) for sizes in ([t.before for t in tensors], [t.after for t in tensors]))
    quantized = sum(1 for each in tensors if not each.reason)
    rows = [_row(name, members) for name, members in plan.groups().items()]
    titles = ("tensor", "becomes", "input", "stays float because"), ("number", "shape", "MB", "MB after")
    console.print(table(*titles, rows))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{type(plan.module).__name__}: {quantized} of {len(tensors)} tensors are quantized, {before / 1e6:,.1f} MB "
        f"become {after / 1e6:,.1f} MB; recipe {plan.recipe}",
        markup=False,
    )


def _row(name: str, members: list[TensorPlan]) -> tuple[str, ...]:
    first = members[0]
    sizes = (f"{math.fsum(sizes) / 1e6:.2f}" for sizes in ([m.before for m in members], [m.after for m in members]))
    shape = "x".join(map(str, first.shape))
    return (name, first.format, first.input or "", first.reason, str(len(members)), shape, *sizes)


@contextmanager
def _warnings_printed() -> Generator[None]:
    """Print warnings as messages at the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        messages().print(f"warning: {warning.message}", markup=False)
