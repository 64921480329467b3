"""The commands that print lists: `mxcompile passes | recipes | formats | groups`."""

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, UnfoldableInput, find_groups
from mxcompile.analysis.folds.orders import OrderGroup, find_orders
from mxcompile.cli.arguments import Json, Model
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.model_source import load_weights
from mxcompile.cli.progress import waiting
from mxcompile.diagnostics.tables import table
from mxcompile.errors import UnknownNameError
from mxcompile.formats import FORMATS, MXFormat, activation_rule
from mxcompile.graph.program import where
from mxcompile.graph.trace import trace
from mxcompile.passes import PASSES
from mxcompile.passes.recipes import DEFAULT, QUICK, recipes
from mxcompile.pipeline import text_form
from mxcompile.pipeline.interfaces import Pass


def show_passes(
    name: Annotated[str | None, typer.Argument(metavar="PASS", help="a pass to describe in detail")] = None,
    as_json: Json = False,
) -> None:
    """Print the passes, or one of them with its options.

    --json: {"passes": [{"name", "rewrite", "accepts", "gives", "preserves_function", "options": [{"name", "values",
    "default"}]}]}; the default of a required option is null, and "gives" of a pass that keeps the stage.
    """
    if name is not None and name not in PASSES:
        raise UnknownNameError("pass", name, PASSES)
    chosen = PASSES if name is None else {name: PASSES[name]}
    if as_json:
        print_json({"passes": [_pass_record(kind) for kind in chosen.values()]})
    elif name is not None:
        _describe(PASSES[name])
    else:
        rows = [
            (name, _rewrite(kind), ", ".join(option.name for option in text_form.options(kind)))
            for name, kind in PASSES.items()
        ]
        results().print(table(("pass", "rewrite", "options"), (), rows))
        results().print("mxcompile passes PASS: its options, their values and meaning", style="dim")


def show_recipes(as_json: Json = False) -> None:
    """Print the recipes and their pipelines.

    --json: {"recipes": [{"name", "pipeline", "reads_calibration", "default"}]}; default: "with calibration data",
    "without calibration data", or null.
    """
    defaults = {DEFAULT: "with calibration data", QUICK: "without calibration data"}
    pipelines = recipes()
    if as_json:
        print_json(
            {
                "recipes": [
                    {
                        "name": name,
                        "pipeline": str(pipeline),
                        "reads_calibration": pipeline.reads_calibration,
                        "default": defaults.get(name),
                    }
                    for name, pipeline in pipelines.items()
                ]
            }
        )
        return
    screen = results()
    between = "\n" if screen.is_terminal else " "  # one line per recipe in a pipe, so that grep works
    rows = [
        (
            f"{name}{between}(calibrates)" if pipeline.reads_calibration else name,
            f" |{between}".join(map(str, pipeline.passes)),
        )
        for name, pipeline in pipelines.items()
    ]
    screen.print(table(("recipe", "pipeline"), (), rows))
    for name, when in defaults.items():
        screen.print(f"{name} is the default {when}", style="dim")


def show_formats(as_json: Json = False) -> None:
    """Print the formats that have kernels; others, such as mxint3 and mxfp5_e3m1, run in plain PyTorch.

    --json: {"formats": [{"name", "bits", "bits_per_value", "largest", "activation_rule"}]}, at block size 32.
    """
    rules = {name: str(activation_rule(fmt)) for name, fmt in FORMATS.items()}
    if as_json:
        print_json(
            {"formats": [_format_record(fmt) | {"activation_rule": rules[fmt.name]} for fmt in FORMATS.values()]}
        )
        return
    rows = [
        (name, rules[name], str(fmt.bits), f"{fmt.bits_per_value:g}", f"{fmt.max_value:g}")
        for name, fmt in FORMATS.items()
    ]
    numbers = ("bits", "with scale", "largest element")
    results().print(table(("format", "scale rule of activations"), numbers, rows))
    results().print("other block sizes: mxint4:16, :64 or :128; without a kernel: mxint3, mxfp5_e3m1, ...", style="dim")


def show_groups(model: Model = None, as_json: Json = False) -> None:
    """Print the matmul inputs of a language model that a fold can scale, the tensors involved, and why others cannot;
    and those whose channels can change places.

    --json: {"groups": [{"value", "factors", "divided", "multiplied"}], "unfoldable": [{"where", "reason"}],
    "orders": [{"value", "kind", "channels", "cells", "parameters"}], "unordered": [{"where", "reason"}]}; the lists
    hold parameter names.
    """
    with waiting(messages(), "loading"):
        loaded = load_weights(model)
    with waiting(messages(), "tracing"):
        program = trace(loaded, {"input_ids": torch.arange(8)[None]})
        matmuls = choose(program).matmuls
        (groups, unfoldable), (orders, unordered) = find_groups(program, matmuls), find_orders(program, matmuls)
    if as_json:
        lists = {"groups": [_group_record(group) for group in groups], "unfoldable": _miss_records(unfoldable)}
        lists |= {"orders": [_order_record(order) for order in orders], "unordered": _miss_records(unordered)}
        print_json(lists)
        return
    _print_groups(groups)
    _print_misses(unfoldable, "cannot be scaled")
    rows = [(str(order), order.kind.value, _cells(order), str(order.count)) for order in orders]
    results().print(table(("value", "kind", "change places"), ("channels",), rows, f"{len(orders)} order groups"))
    _print_misses(unordered, "cannot be reordered")


def _print_groups(groups: Sequence[ScaleGroup]) -> None:
    rows: list[tuple[str, str, str, str]] = []
    for group in groups:
        one_plus = {a.parameter for a in group.absorbers if a.offset}
        record = _group_record(group)
        divided, multiplied = (
            "\n".join(f"{name} (1 + w)" if name in one_plus else name for name in record[part])
            for part in ("divided", "multiplied")
        )
        rows.append((f"%{group.value.name}", divided, multiplied, str(group.count)))
    results().print(table(("value", "divided in", "multiplied in"), ("factors",), rows, f"{len(groups)} scale groups"))


def _print_misses(misses: Sequence[UnfoldableInput], what: str) -> None:
    if misses:
        rows = [(miss["where"], miss["reason"]) for miss in _miss_records(misses)]
        results().print(table(("skipped", "reason"), (), rows, f"{len(misses)} matmul inputs {what}"))


def _cells(order: OrderGroup) -> str:
    sizes = {len(cell) for cell in order.cells}
    size = str(sizes.pop()) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    return "all" if len(order.cells) == 1 else f"in {len(order.cells)} sets of {size}"


def _describe(kind: type[Pass]) -> None:
    screen = results()
    screen.print(Text(f"{kind.name}: {_rewrite(kind)}", style="bold"), soft_wrap=False)
    text = re.sub(r"\n +", " ", inspect.cleandoc(kind.__doc__ or ""))  # one line per option
    screen.print(Text(text), soft_wrap=False)
    record = _pass_record(kind)
    preserves = "; preserves the function, which is checked" if kind.preserves_function else ""
    stage = f", returns it {record['gives']}" if record["gives"] else ""
    screen.print(Text(f"\ntakes a {' or '.join(record['accepts'])} program{stage}{preserves}", style="dim"))
    rows = [(o.name, o.values, "required" if o.default is None else o.default) for o in text_form.options(kind)]
    if rows:
        screen.print(table(("option", "values", "default"), (), rows))


def _pass_record(kind: type[Pass]) -> dict[str, Any]:
    return {
        "name": kind.name,
        "rewrite": _rewrite(kind),
        "accepts": [stage.name.lower() for stage in sorted(kind.accepts)],
        "gives": None if kind.gives is None else kind.gives.name.lower(),
        "preserves_function": kind.preserves_function,
        "options": [asdict(option) for option in text_form.options(kind)],
    }


def _format_record(fmt: MXFormat) -> dict[str, Any]:
    return {"name": fmt.name, "bits": fmt.bits, "bits_per_value": fmt.bits_per_value, "largest": fmt.max_value}


def _rewrite(kind: type[Pass]) -> str:
    """The first line of the pass's file."""
    return (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]


def _group_record(group: ScaleGroup) -> dict[str, Any]:
    divided, multiplied = ([a.parameter for a in group.absorbers if a.power == power] for power in (-1, 1))
    return {"value": group.value.name, "factors": group.count, "divided": divided, "multiplied": multiplied}


def _order_record(order: OrderGroup) -> dict[str, Any]:
    names = sorted({name for name, _ in order.parameters})
    cells = [len(cell) for cell in order.cells]
    return {
        "value": order.value.name,
        "kind": order.kind.value,
        "channels": order.count,
        "cells": cells,
        "parameters": names,
    }


def _miss_records(misses: Sequence[UnfoldableInput]) -> list[dict[str, str]]:
    return [{"where": where(miss.matmul.node), "reason": miss.reason} for miss in misses]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    commands = {"passes": show_passes, "recipes": show_recipes, "formats": show_formats, "groups": show_groups}
    for name, command in commands.items():
        app.command(name)(command)
