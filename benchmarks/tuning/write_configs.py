"""Writes the table of tile configs that the GPU linears use: the fastest correct config of each case of a sweep.

    python -m tuning.write_configs sweep.jsonl ../mxcompile/kernels/configs/sm80.jsonl     in benchmarks/; needs no GPU

Prints how much faster than cuBLAS bf16 the 4 linears of a layer are with them; without a second file it only prints.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemm_timing import read, totals

from mxcompile.kernels.tuned_configs import GLUON


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tuning.write_configs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, help="records of tuning.sweep, one JSON object a line")
    parser.add_argument("table", type=Path, nargs="?", help="the table to write: mxcompile/kernels/configs/smNN.jsonl")
    arguments = parser.parse_args()
    lines = read(arguments.sweep)
    print(*totals(fastest(lines)), sep="\n")
    if arguments.table:
        chosen = table(lines)
        arguments.table.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        print(f"{len(chosen)} configs written to {arguments.table}")


def fastest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest correct line of each format, shape and number of tokens. Dependent launch, which a kernel supports
    and the table does not use, is left out."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        if "us" not in line or "config" not in line or line["config"].get("dependent", False):
            continue
        case = _case(line)
        if case not in best or line["us"] < best[case]["us"]:
            best[case] = line
    return list(best.values())


def table(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `mxcompile/kernels/tuned_configs.py` reads: the fastest lines. Where that is the Gluon kernel, the fastest
    other one follows, for GPUs and activations that the Gluon kernel does not support."""
    others = {_case(line): line for line in fastest(line for line in lines if line["path"] != GLUON)}
    chosen: list[dict[str, Any]] = []
    for line in fastest(lines):
        chosen += [line, *([others[_case(line)]] if line["path"] == GLUON and _case(line) in others else [])]
    return [{name: line[name] for name in ("weight", "n", "k", "m", "path", "config")} for line in chosen]


def _case(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("weight", "n", "k", "m"))


if __name__ == "__main__":
    main()
