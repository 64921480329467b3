"""Writes the table of tile configs that the GPU linears use: the fastest correct config of each case of a sweep.

    python -m tuning.write_configs sweep.jsonl ../mxcompile/kernels/configs/sm80.jsonl     in benchmarks/; needs no GPU

Prints how much faster than cuBLAS bf16 the 4 linears of a layer are with them; without a second file it only prints.
`--rows 8,32` takes only these numbers of tokens from the sweep, `--rest TABLE` all other cases from another table.
`--chain` takes the configs of one token from records of layer_chain.py, where kernels follow one another as in a model.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from gemm_timing import read, totals

from mxcompile.kernels.triton import held_planes, integer_planes
from mxcompile.kernels.tuned_configs import GLUON, HELD, INTEGERS

_DROPPED = {"slices", "tail"}
"""Fields of configs in the sweep of an H200 whose kernels were not kept; docs/kernels.md says why."""
_CHAINED: Final = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(n, k) of the matmuls of layer_chain.py."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tuning.write_configs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, help="records of tuning.sweep, one JSON object a line")
    parser.add_argument("table", type=Path, nargs="?", help="the table to write: mxcompile/kernels/configs/smNN.jsonl")
    parser.add_argument("--rows", help="the only numbers of tokens to take from the sweep, comma-separated")
    parser.add_argument("--rest", type=Path, help="a table with the other cases")
    parser.add_argument("--chain", type=Path, help="records of layer_chain.py")
    arguments = parser.parse_args()
    rows = list(map(int, arguments.rows.split(","))) if arguments.rows else None
    lines = [line for line in read(arguments.sweep) if rows is None or line["m"] in rows]
    print(*totals([line for line in fastest(lines) if "us" in line]), sep="\n")
    if arguments.table:
        chosen = table(lines, read(arguments.rest) if arguments.rest else [])
        chosen = chained(read(arguments.chain), chosen) if arguments.chain else chosen
        arguments.table.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        print(f"{len(chosen)} configs written to {arguments.table}")


def fastest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest correct line of each format, shape and number of tokens. Dependent launch, which a kernel supports
    and the table does not use, and kernels that were tried and dropped are left out."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        if _us(line) is None or line["config"].get("dependent", False) or _DROPPED & line["config"].keys():
            continue
        case = _case(line)
        if case not in best or _rank(line) < _rank(best[case]):
            best[case] = line
    return list(best.values())


def table(lines: Sequence[dict[str, Any]], rest: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """What `mxcompile/kernels/tuned_configs.py` reads: the fastest lines. Where that is the Gluon kernel, the fastest
    other one follows, for GPUs and activations that the Gluon kernel does not support. A case that was measured with
    dependent launch alone has the fastest config without it. rest: a table with the cases that were not measured."""
    alone = {_case(line) for line in fastest(lines)}
    lines = [line if _case(line) in alone else _without_dependent_launch(line) for line in lines]
    others = {_case(line): line for line in fastest(line for line in lines if line["path"] != GLUON)}
    chosen: list[dict[str, Any]] = []
    for line in fastest(lines):
        chosen += [line, *([others[_case(line)]] if line["path"] == GLUON and _case(line) in others else [])]
    measured = {_case(line) for line in chosen}
    chosen += [line for line in rest if _case(line) not in measured]
    return [{name: line[name] for name in ("weight", "n", "k", "m", "path", "config")} for line in chosen]


def chained(lines: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with the MXINT4 configs of one token that made a layer of the chain the fastest, each changed alone,
    and those of the integer kernel for inputs that are rounded to integers."""
    held = _of_the_chain(lines, "small matmuls", {"rows": 1, "out": 16}, vars(held_planes.Config()))
    integers = _of_the_chain(lines, "small matmuls integers", {}, vars(integer_planes.Config()))
    line_of = {case: {"path": HELD, "config": config} for case, config in held.items()}
    cases = [dict(zip(("weight", "n", "k", "m"), case, strict=True)) for case in integers]
    added = [case | {"path": INTEGERS, "config": config} for case, config in zip(cases, integers.values(), strict=True)]
    return [line | line_of.get(_case(line), {}) for line in table if line["path"] != INTEGERS] + added


def _of_the_chain(
    lines: Sequence[dict[str, Any]], early: str, always: dict[str, Any], usual: dict[str, Any]
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Case -> the fields of the fastest config that are not the usual ones, or are to be there always."""
    right = [line for line in lines if line["early"] == early and line["right"]]
    configs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for role, (n, k) in _CHAINED.items():
        best = min((line for line in right if line["changed"] in ("", role)), key=lambda line: line["layer_us"])
        changed = {name: value for name, value in best["configs"][role].items() if value != usual[name]}
        configs["mxint4", n, k, 1] = always | changed
    return configs


def _us(line: dict[str, Any]) -> float | None:
    return line.get("us", line.get("quick_us")) if "config" in line else None


def _rank(line: dict[str, Any]) -> tuple[bool, float | None]:
    """A line that was timed beside cuBLAS before one that was timed quickly."""
    return "us" not in line, _us(line)


def _without_dependent_launch(line: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in line.get("config", {}).items() if name not in ("dependent", "prefetch")}
    return line | {"config": kept}


def _case(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("weight", "n", "k", "m"))


if __name__ == "__main__":
    main()
