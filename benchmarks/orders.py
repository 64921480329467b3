"""Order groups of many architectures: how many there are, and that channels in a random order keep the function.

    python benchmarks/orders.py --out benchmarks/results/orders.jsonl

The tiny models of `folds.py`, in float64, so that a channel in a wrong place shows and the order of sums does not (some
models compute their norms in float32 all the same). `hidden`, `heads`, `stream`: order groups; `fixed`: matmuls whose
input channels stay, for `reasons`; `sqnr_db`: outputs with all groups in random orders at once, on inputs of another
batch size than traced, where the graph allows it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import torch
from architectures import ARCHITECTURES, build, inputs, output
from torch import Tensor

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.orders import OrderKind, find_orders, reorder
from mxcompile.errors import InputError
from mxcompile.numerics.metrics import sqnr_db

REQUIRED_DB: Final = 120.0


def measure(name: str) -> dict[str, Any]:
    program = mxcompile.trace(build(name).double(), _wide(inputs(name)))
    groups, fixed = find_orders(program, choose(program).matmuls)
    ordered, generator = program.copy(), torch.Generator().manual_seed(0)
    for group in groups:
        reorder(ordered, group, group.sorted_by(torch.rand(group.count, generator=generator)))
    probe = _wide(inputs(name, batch=3, length=8, seed=1))
    try:
        expected = output(program(**probe))
    except (InputError, RuntimeError):  # traced for one batch size
        probe = _wide(inputs(name))
        expected = output(program(**probe))
    kinds = [group.kind for group in groups]
    return {
        "architecture": name,
        **{kind.value: kinds.count(kind) for kind in OrderKind},
        "fixed": len(fixed),
        "sqnr_db": round(min(sqnr_db(expected, output(ordered(**probe))), 400.0), 1),
        "reasons": sorted({miss.reason for miss in fixed}),
    }


def _wide(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="architectures, comma-separated; default: all")
    parser.add_argument("--out", type=Path, help="append the records to this file, one JSON object a line")
    arguments = parser.parse_args()
    changed: list[str] = []
    for name in arguments.only.split(",") if arguments.only else ARCHITECTURES:
        record = measure(name)
        print(json.dumps(record), flush=True)
        if record["sqnr_db"] < REQUIRED_DB:
            changed.append(name)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print(f"{len(changed)} changed by an order: {', '.join(changed) or 'none'}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
