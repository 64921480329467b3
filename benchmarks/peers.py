"""Other projects' 4-bit weights beside ours, all scored by the same code.

    python benchmarks/peers.py --calibration-text c4.jsonl --test-text wikitext2-validation.txt \\
        --out benchmarks/results/peers.jsonl

SmolLM2-135M-Instruct, weight-only, in the linears of the decoder; embedding and output head stay in float. Every peer
has a virtual environment of its own, reads the same float32 checkpoint and the same token ids, and writes its weights
dequantized (`peers/`), which are then loaded into the same model as ours.
`gap_closed` is the share recovered of the gap between the float model and rounding to MXFP4 with OCP's scales.
"""

import argparse
import copy
import importlib.metadata
import json
import math
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import accuracy
import torch
from peer_runs import PEERS, Job, quantized
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.cli import smollm2
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.graph.program import Program
from mxcompile.pipeline.pipeline import Pipeline

Batches = list[dict[str, Tensor]]

FLOOR: Final = "mxcompile-floor-mxfp4"
"""The row at which `gap_closed` is 0: read from `--out` if it is there for the same texts, measured otherwise."""
OURS: Final = {
    FLOOR: ("mxfp4", "round-weights{format=mxfp4,rule=floor}"),
    "mxcompile-rtn-mxfp4": ("mxfp4", "round-weights{format=mxfp4}"),
    "mxcompile-rtn-mxint4": ("mxint4", "round-weights{format=mxint4}"),
    "mxcompile-gptq-mxfp4": ("mxfp4", "awq-fold{weight=mxfp4} | gptq{format=mxfp4,correction=0.25}"),
    "mxcompile-gptq-mxint4": ("mxint4", "awq-fold{weight=mxint4} | gptq{format=mxint4,correction=0.25}"),
    "mxcompile-tuned-mxfp4": ("mxfp4", "awq-fold{weight=mxfp4} | gptq{format=mxfp4,correction=0.25} | tune-vectors"),
    "mxcompile-tuned-mxint4": (
        "mxint4",
        "awq-fold{weight=mxint4} | gptq{format=mxint4,correction=0.25} | tune-vectors",
    ),
}
"""(format, passes in front of lower-mx) by row."""
THEIRS: Final = tuple(
    (peer, algorithm, fmt)
    for peer, algorithms, formats in (
        ("torchao", ("rtn-rceil", "rtn-even"), ("mxfp4",)),
        ("torchao", ("rtn",), ("int4",)),
        ("llm-compressor", ("rtn", "gptq"), ("mxfp4", "int4")),
        ("auto-round", ("signed-gradient",), ("mxfp4", "mxint4", "int4")),
    )
    for algorithm in algorithms
    for fmt in formats
)
"""(peer, algorithm, format); a row's name joins all three."""
BITS: Final = {"mxfp4": 4 + 8 / 32, "mxint4": 4 + 8 / 32, "int4": 4 + 16 / 32}
"""Bits a weight in groups of 32: a scale has 8 bits in MX and 16 beside int4."""
LEVELS: Final = 16
"""The most different values that a group of 4-bit elements can hold."""
SEED: Final = 0


def main() -> None:
    arguments = parser().parse_args()
    chosen = wanted(arguments.only)
    model, tokenizer = smollm2.load()
    batches, test = accuracy.texts(arguments, tokenizer)
    program = mxcompile.trace(model, {"input_ids": batches[0]["input_ids"][:1, :64]})
    about = accuracy.described(arguments, batches, test)
    rows = [] if FLOOR in chosen else measured(FLOOR, about, arguments.out)
    exact = rows[0]["float_nll"] if rows else evaluate(model, test).nll
    for name in chosen if rows else dict.fromkeys((FLOOR, *chosen)):
        if name in OURS:
            row, quantized_model = ours(name, model, program, batches)
        else:
            row, quantized_model = theirs(name, model, tokenizer, program, batches, arguments.environments)
        score = evaluate(quantized_model, test)
        row |= {"float_nll": round(exact, 4), "nll": round(score.nll, 4), "perplexity": round(score.perplexity, 3)}
        row["gap_closed"] = round((rows[0]["nll"] - row["nll"]) / (rows[0]["nll"] - exact), 3) if rows else 0.0
        rows.append({"row": name} | row | about)
        print(json.dumps(rows[-1]), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows, math.exp(exact))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows, comma-separated, or patterns such as torchao-*")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--calibration-text", type=Path, help="a .txt file, or a .jsonl file with one text a line")
    parser.add_argument("--test-text", type=Path, help="likewise; default: Python's help topics")
    parser.add_argument("--test-half", choices=accuracy.HALVES, default="second", help="which half of the test text")
    parser.add_argument("--windows", type=int, default=16, help="test windows")
    parser.add_argument("--length", type=int, default=2048, help="tokens a test window")
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path("out/peers"),
        help="folder of their environments and logs: %(default)s",
    )
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    parser.set_defaults(device="cpu")
    return parser


def measured(name: str, about: dict[str, Any], out: Path | None) -> list[dict[str, Any]]:
    """The last record of that row with the same texts, or nothing."""
    lines = out.read_text().splitlines() if out and out.exists() else []
    records = [record for record in map(json.loads, lines) if record["row"] == name]
    return [record for record in records if record.items() >= about.items()][-1:]


def wanted(only: str) -> list[str]:
    """Names of the rows to measure; stops if a pattern matches none."""
    names = [*OURS, *("-".join(row) for row in THEIRS)]
    patterns = only.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            sys.exit(f"--only: no row is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def ours(name: str, model: Any, program: Program, batches: Batches) -> tuple[dict[str, Any], Any]:
    """(the row without its score, the deployed model)."""
    fmt, passes = OURS[name]
    torch.manual_seed(SEED)
    began = time.perf_counter()
    lowered = Pipeline.parse(f"{passes} | lower-mx{{weight={fmt}}}").run(program, batches)
    seconds = time.perf_counter() - began
    row = {"peer": "mxcompile", "version": importlib.metadata.version("mxcompile"), "algorithm": passes}
    row |= {"format": fmt, "bits": BITS[fmt], "seconds": round(seconds, 1)}
    return row, mxcompile.deploy(lowered, model, check=False)


def theirs(
    name: str, model: Any, tokenizer: Any, program: Program, batches: Batches, folder: Path
) -> tuple[dict[str, Any], Any]:
    """(the row without its score, our model with the peer's weights)."""
    peer, algorithm, fmt = next(row for row in THEIRS if "-".join(row) == name)
    checkpoint, calibration = folder / "checkpoint", folder / "calibration.safetensors"
    write_checkpoint(model, tokenizer, checkpoint)
    save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, calibration)
    state, seconds = quantized(Job(peer, algorithm, fmt, checkpoint, calibration, SEED), folder)
    check(name, state, model.state_dict(), {matmul.parameter for matmul in choose(program).matmuls})
    row = {"peer": peer, "version": PEERS[peer].version, "algorithm": algorithm}
    row |= {"format": fmt, "bits": BITS[fmt], "seconds": seconds}
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state, strict=False)  # without the tied output head
    return row, loaded


def write_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """A folder as a model hub holds it, of a copy: transformers refuses to save a model that it has read from GGUF."""
    if folder.exists():
        return
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    partial = folder.with_suffix(".partial")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)


def check(name: str, state: dict[str, Tensor], exact: dict[str, Tensor], linears: set[str]) -> None:
    """Stop unless exactly our linears have changed, and no group has more different values than 4 bits can encode."""
    changed = {key for key, value in state.items() if not torch.equal(value, exact[key])}
    if changed != linears:
        some = ", ".join(sorted(changed ^ linears)[:4])
        sys.exit(f"{name}: it changed other weights than ours: {some} ...; fix its script in peers/")
    groups = (state[key].unflatten(-1, (-1, 32)).sort(-1).values for key in sorted(linears))
    most = max(int((group.diff(dim=-1) != 0).sum(-1).max()) + 1 for group in groups)
    if most > LEVELS:
        sys.exit(f"{name}: a group of 32 weights has {most} values: these are not 4 bits; fix its script in peers/")


def show(rows: list[dict[str, Any]], exact: float) -> None:
    """The table, the best row last."""
    table = Table("row", title=f"float: perplexity {exact:.2f}", box=None)
    for column in ("bits", "perplexity", "nll", "gap_closed", "seconds"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: -row["nll"]):
        numbers = (f"{row['perplexity']:.2f}", f"{row['nll']:.4f}", f"{row['gap_closed']:.0%}", f"{row['seconds']:.0f}")
        table.add_row(row["row"], f"{row['bits']:.2f}", *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
