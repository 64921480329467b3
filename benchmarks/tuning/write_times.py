"""Writes the table of measured times by which `allocate{microseconds=...}` chooses formats.

    python -m tuning.write_times results/gemm-h100.jsonl ../mxcompile/kernels/times/sm90.jsonl     in benchmarks/

Of every format, shape and number of tokens the fastest of mxcompile's kernels for inputs in bf16, and as "float" the
fastest cuBLAS product in bf16.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from gemm_timing import read

TOKENS: Final = (1, 2048)
PATHS: Final = ("planes", "gluon", "dequantize+cublas")


def times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each format, number of tokens and shape, in the order of the records."""
    best: dict[tuple[Any, ...], float] = {}
    for line in lines:
        if line.get("m") not in TOKENS or line.get("path") not in PATHS or line["activation"] != "bf16":
            continue
        shape = line["m"], line["n"], line["k"]
        for name, us in ((line["weight"], line["us"]), ("float", line["cublas_bf16_us"])):
            best[name, *shape] = min(us, best.get((name, *shape), us))
    return [dict(zip(("weight", "m", "n", "k", "us"), (*key, us), strict=True)) for key, us in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tuning.write_times", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, help="records of gemm.py, the first of which names the device")
    parser.add_argument("table", type=Path, help="the table to write: mxcompile/kernels/times/smNN.jsonl")
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.records.read_text().splitlines()]
    lines = [{"device": records[0]["device"]}, *times(read(arguments.records))]
    arguments.table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines) - 1} times written to {arguments.table}")


if __name__ == "__main__":
    main()
