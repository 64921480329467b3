"""What a rotation saves, value by value: nothing, a Hadamard matrix for all blocks, or a matrix for each (WUSH).

    python benchmarks/rotations.py --calibration-text c4.jsonl --formats mxfp4/mxfp4 --out FILE

SmolLM2-135M: the inputs of q, k, v; of o; of gate, up; of down in every layer. The error is that of the outputs of all
readers of a value, squared, over the outputs' squares, on tokens that the matrices were not made from; weights are
rounded to nearest (`rtn`) or by `ColumnRounding` (`gptq`). Tokens with more than 20 times the median energy are left
out. A record has, for each rounding: `wins`, the number of values in which WUSH has a smaller error than Hadamard's
rotation, `over_hadamard`, the mean ratio of the two errors, and `by_value`, the errors by kind of rotation.
"""

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accuracy import write
from torch import Tensor, nn

from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.formats import MXFormat, ScaleRule, parse_format
from mxcompile.numerics import reference
from mxcompile.numerics.block_transforms import apply_to_blocks, undo_in_weight, whitening_transforms
from mxcompile.numerics.column_rounding import ColumnRounding
from mxcompile.numerics.hadamard import rotate_input, rotate_weight

KINDS = ("none", "hadamard", "wush")
LARGEST_ENERGY = 20.0
Convert = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens; two thirds make the matrices")
    parser.add_argument("--formats", default="mxfp4/mxfp4")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    weight, activation = map(parse_format, arguments.formats.split("/"))
    with torch.no_grad():
        values = inputs_of(*smollm2.load(), arguments.calibration_text, arguments.windows)
        errors = {name: errors_of(x, w, weight, activation) for name, (x, w) in values.items()}
    row: dict[str, Any] = {"model": smollm2.NAME, "weight": str(weight), "activation": str(activation)}
    row |= {"values": len(errors), "calibration": f"{arguments.calibration_text.name}, {arguments.windows}x512"}
    for rounding in ("rtn", "gptq"):
        of_all = {name: [each[rounding, kind] for kind in KINDS] for name, each in errors.items()}
        row[f"{rounding} wins"] = sum(wush < hadamard for _, hadamard, wush in of_all.values())
        row[f"{rounding} over_hadamard"] = round(mean(wush / hadamard for _, hadamard, wush in of_all.values()), 4)
        row[f"{rounding} by_value"] = {name: [round(error, 8) for error in each] for name, each in of_all.items()}
    write(row, arguments.out)
    print(json.dumps({key: value for key, value in row.items() if "by_value" not in key}))


def inputs_of(model: nn.Module, tokenizer: Any, text: Path, windows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By the readers' names: a value `[tokens, in]` and all weights that read it `[out, in]`."""
    seen: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):  # pyright: ignore
        attention, mlp = layer.self_attn, layer.mlp
        for name, readers in (
            ("qkv", [attention.q_proj, attention.k_proj, attention.v_proj]), ("o", [attention.o_proj]),
            ("gate_up", [mlp.gate_proj, mlp.up_proj]), ("down", [mlp.down_proj]),
        ):  # fmt: skip
            own = seen.setdefault(f"{index}.{name}", [])
            weights[f"{index}.{name}"] = torch.cat([reader.weight for reader in readers])
            readers[0].register_forward_pre_hook(lambda _, args, own=own: own.append(args[0].flatten(0, -2)))
    ids = token_ids(tokenizer, read_text(text))
    for window in islice(token_windows(ids, 512, windows, tokenizer=tokenizer), windows):
        model.model(window)  # pyright: ignore
    return {name: (torch.cat(rows), weights[name]) for name, rows in seen.items()}


def errors_of(x: Tensor, weight: Tensor, fmt: MXFormat, activation: MXFormat) -> dict[tuple[str, str], float]:
    """Relative squared errors by rounding and kind of rotation."""
    energy = x.square().sum(1)
    usual = energy < LARGEST_ENERGY * energy.median()
    count = len(x) * 2 // 3
    fit, test = x[:count][usual[:count]], x[count:][usual[count:]]
    runs = fit.unflatten(1, (-1, 32))
    transforms = whitening_transforms(torch.einsum("tbi,tbj->bij", runs, runs) / len(fit), weight).float()
    kinds: dict[str, tuple[Convert, Convert]] = {
        "none": (lambda rows: rows, lambda rows: rows),
        "hadamard": (lambda rows: rotate_input(rows, 32), lambda rows: rotate_weight(rows, 32)),
        "wush": (lambda rows: apply_to_blocks(rows, transforms), lambda rows: undo_in_weight(rows, transforms)),
    }
    exact = test @ weight.T
    errors: dict[tuple[str, str], float] = {}
    for kind, (prepare, convert) in kinds.items():
        rounded, seen = (
            reference.quantize_dequantize(prepare(rows), activation, ScaleRule.FLOOR) for rows in (test, fit)
        )
        rows = convert(weight)
        for rounding, q in (
            ("rtn", reference.quantize_dequantize(rows, fmt, ScaleRule.MSE)),
            ("gptq", ColumnRounding(fmt).round(rows, seen.T @ seen)[0]),
        ):
            errors[rounding, kind] = float((rounded @ q.T - exact).square().sum() / exact.square().sum())
    return errors


if __name__ == "__main__":
    main()
