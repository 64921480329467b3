"""The commands that print what there is: `mxcompile passes | recipes | formats | groups`."""

import inspect
import re
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups
from mxcompile.cli.arguments import Json, Model
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.model_source import load_model
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
    name: Annotated[str | None, typer.Argument(metavar="PASS", help="all about one of them")] = None,
    as_json: Json = False,
) -> None:
    """Print the passes, or what one of them does, needs and takes.

    --json: {"passes": [{"name", "rewrite", "accepts", "gives", "preserves_function", "options": [{"name", "values",
    "default"}]}]}; a default is null where the option must be given, "gives" where the stage stays.
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
        results().print("mxcompile passes PASS: what its options mean, and what they may be", style="dim")


def show_recipes(as_json: Json = False) -> None:
    """Print the recipes and the pipelines they stand for.

    --json: {"recipes": [{"name", "pipeline", "reads_calibration", "default"}]}; default: with calibration data, without
    it, or null.
    """
    defaults = {DEFAULT: "with calibration data", QUICK: "without calibration data"}
    found = recipes()
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
                    for name, pipeline in found.items()
                ]
            }
        )
        return
    screen = results()
    between = "\n" if screen.is_terminal else " "  # one line a recipe where it may be searched
    rows = [
        (
            f"{name}{between}(calibrates)" if pipeline.reads_calibration else name,
            f" |{between}".join(map(str, pipeline.passes)),
        )
        for name, pipeline in found.items()
    ]
    screen.print(table(("recipe", "pipeline"), (), rows))
    for name, when in defaults.items():
        screen.print(f"{name} is the default {when}", style="dim")


def show_formats(as_json: Json = False) -> None:
    """Print the formats that kernels serve; others go by name too, such as mxint3 and mxfp5_e3m1.

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
    results().print("blocks of 16, 64 or 128: mxint4:64; elements without a kernel: mxint3, mxfp5_e3m1", style="dim")


def show_groups(model: Model = None, as_json: Json = False) -> None:
    """Print which matmul inputs of a language model can be scaled, by what, and why others cannot.

    --json: {"groups": [{"value", "factors", "divided", "multiplied"}], "unfoldable": [{"where", "reason"}]}; lists hold
    names of parameters.
    """
    with waiting(messages(), "loading"):
        loaded, tokenizer = load_model(model)
    with waiting(messages(), "tracing"):
        program = trace(loaded, {"input_ids": tokenizer("The capital of France is", return_tensors="pt").input_ids})
        found, unfoldable = find_groups(program, choose(program).matmuls)
    left = [{"where": where(miss.matmul.node), "reason": miss.reason} for miss in unfoldable]
    if as_json:
        print_json({"groups": [_group_record(group) for group in found], "unfoldable": left})
        return
    rows: list[tuple[str, str, str, str]] = []
    for group in found:
        one_plus = {a.parameter for a in group.absorbers if a.offset}
        record = _group_record(group)
        divided, multiplied = (
            "\n".join(f"{name} (1 + w)" if name in one_plus else name for name in record[part])
            for part in ("divided", "multiplied")
        )
        rows.append((f"%{group.value.name}", divided, multiplied, str(group.count)))
    screen = results()
    screen.print(table(("value", "divided in", "multiplied in"), ("factors",), rows, f"{len(found)} scale groups"))
    if left:
        misses = [(miss["where"], miss["reason"]) for miss in left]
        screen.print(table(("not foldable", "because"), (), misses, f"{len(left)} matmul inputs are left alone"))


def _describe(kind: type[Pass]) -> None:
    screen = results()
    screen.print(Text(f"{kind.name}: {_rewrite(kind)}", style="bold"), soft_wrap=False)
    text = re.sub(r"\n +", " ", inspect.cleandoc(kind.__doc__ or ""))  # an option in a line, as long as it is
    screen.print(Text(text), soft_wrap=False)
    record = _pass_record(kind)
    keeps = "; keeps the function, which is checked" if kind.preserves_function else ""
    stage = f", leaves it {record['gives']}" if record["gives"] else ""
    screen.print(Text(f"\nworks on a {' or '.join(record['accepts'])} program{stage}{keeps}", style="dim"))
    rows = [(o.name, o.values, "must be given" if o.default is None else o.default) for o in text_form.options(kind)]
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
    """The first line of its file."""
    return (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]


def _group_record(group: ScaleGroup) -> dict[str, Any]:
    divided, multiplied = ([a.parameter for a in group.absorbers if a.power == power] for power in (-1, 1))
    return {"value": group.value.name, "factors": group.count, "divided": divided, "multiplied": multiplied}


def add_to(app: typer.Typer) -> None:
    """Make them commands."""
    commands = {"passes": show_passes, "recipes": show_recipes, "formats": show_formats, "groups": show_groups}
    for name, command in commands.items():
        app.command(name)(command)
