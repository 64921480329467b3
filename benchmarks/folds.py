"""Scale groups of many architectures: how many there are, and that folding factors into them keeps the function.

    python benchmarks/folds.py --out benchmarks/results/folds.jsonl

Tiny random float32 models made from transformers configs (`architectures.py`), with two outlier channels; nothing is
quantized. `groups`: scale groups; `folded`: those that factors were folded into; `multiplied`: values that need an
explicit multiply in the graph; `skipped`: matmuls with neither. `sqnr_db_smooth`: outputs after
`smooth-quant{through_linears=true}`; `sqnr_db_awq`: after random factors, up to 2^10 apart, in all groups and explicit
multiplies at once. Both are measured on inputs of another batch size than traced, where the graph allows it.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, build, inputs, output

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups, fold
from mxcompile.analysis.folds.multiplier import fold_into_multiplier, multiplier_groups
from mxcompile.errors import InputError
from mxcompile.graph.program import Program
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.pipeline.pipeline import Pipeline

REQUIRED_DB = 100.0
HEADER = f"{'architecture':18} {'groups':>6} {'folded':>6} {'multiplied':>10} {'skipped':>7} {'smooth':>7} {'awq':>7}"


def fold_random(
    program: Program, groups: Iterable[ScaleGroup], unfoldable: Iterable[ScaleGroup] = (), octaves: float = 10.0
) -> Program:
    """A copy with random factors, up to 2^octaves apart, folded into every group, and multiplied where none can be."""
    folded = program.copy()
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        fold(folded, group, torch.exp2((torch.rand(group.count, generator=generator) - 0.5) * octaves))
    for group in unfoldable:
        factors = torch.exp2((torch.rand(group.count, generator=generator) - 0.5) * octaves)
        fold_into_multiplier(folded, {node.name for node in group.nodes}, factors)
    return folded


def measure(name: str) -> dict[str, Any]:
    program = mxcompile.trace(build(name), inputs(name))
    groups, unfoldable = find_groups(program, choose(program).matmuls)
    alone = multiplier_groups(program, unfoldable)
    smooth = Pipeline.parse("smooth-quant{through_linears=true}").run(program)
    probe = inputs(name, batch=3, length=8, seed=1)
    try:
        wanted = output(program(**probe))
    except (InputError, RuntimeError):  # traced for one batch size
        probe = inputs(name)
        wanted = output(program(**probe))
    return {
        "architecture": name,
        "groups": len(groups),
        "folded": smooth.ledger[0].rewrites,
        "multiplied": len(alone),
        "skipped": len(unfoldable) - sum(len(group.matmuls) for group in alone),
        "sqnr_db_smooth": round(sqnr_db(wanted, output(smooth(**probe))), 1),
        "sqnr_db_awq": round(sqnr_db(wanted, output(fold_random(program, groups, alone)(**probe))), 1),
        "reasons": sorted({miss.reason for miss in unfoldable}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="architectures, comma-separated; default: all")
    parser.add_argument("--out", type=Path, help="write the records to this file, one JSON object a line")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    print(HEADER)
    for name in arguments.only.split(",") if arguments.only else ARCHITECTURES:
        records.append(measure(name))
        *numbers, _ = records[-1].values()
        print("{:18} {:6} {:6} {:10} {:7} {:7} {:7}".format(*numbers), flush=True)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    changed = [r["architecture"] for r in records if min(r["sqnr_db_smooth"], r["sqnr_db_awq"]) < REQUIRED_DB]
    print(f"{len(records)} architectures, {len(changed)} changed by a fold: {', '.join(changed) or 'none'}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
