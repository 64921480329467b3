"""The source paper's study (Sharify et al., arXiv 2405.07135), repeated and extended on SmolLM2-135M.

    python benchmarks/study.py --test-text wikitext2-validation.txt --calibration-text c4.jsonl --device cuda

{RTN, GPTQ, SmoothQuant, AWQ, SmoothQuant + GPTQ, AWQ + GPTQ} x weight formats x block sizes, activations of 8 bits of
the same kind; GPTQ is the paper's (micro-block of 128, OCP scales) or ours. The reversed order, a fold after GPTQ, is
one that a pipeline refuses: here the rounded weights are declared float again, folded, and rounded to nearest. (Our
search never takes factors that lose: on weights that are already rounded it may fold nothing.)
Prints perplexities, one line a format and block, and where the ranking differs from the paper's.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import accuracy
from torch import Tensor

import mxcompile
from mxcompile import smollm2
from mxcompile.evaluation import evaluate
from mxcompile.pipeline import Pipeline
from mxcompile.program import Program, Stage

Batches = list[dict[str, Tensor]]
ROUND, LOWER = "round-weights{format=W,rule=floor}", "lower-mx{weight=W,activation=A}"
GPTQ = {
    "paper": "gptq{format=W,activation=A,order=none,rule=floor,microblock=128}",
    "ours": "gptq{format=W,activation=A,correction=0.25}",
}
SMOOTH, AWQ = "smooth-quant", "awq-fold{weight=W,activation=A}"
WORST_TO_BEST: Final = ("RTN", "GPTQ", "AWQ+GPTQ")
"""What the paper finds below 8 bits in every model (its Tables 1 and 2); SmoothQuant is above or below RTN."""


def pipelines(gptq: str) -> dict[str, str]:
    """Passes in front of lower-mx, by the paper's name."""
    return {
        "RTN": ROUND,
        "GPTQ": gptq,
        "SmoothQuant": f"{SMOOTH} | {ROUND}",
        "AWQ": f"{AWQ} | {ROUND}",
        "SmoothQuant+GPTQ": f"{SMOOTH} | {gptq}",
        "AWQ+GPTQ": f"{AWQ} | {gptq}",
    }


def reversed_order(program: Program, batches: Batches, gptq: str, names: dict[str, str]) -> Program:
    """GPTQ, then AWQ: the rounded weights are taken for float ones."""
    rounded = Pipeline.parse(filled(gptq, names)).run(program, batches)
    rounded.stage = Stage.FLOAT
    rounded.rounded.clear()
    return Pipeline.parse(filled(f"{AWQ} | {ROUND} | {LOWER}", names)).run(rounded, batches)


def filled(text: str, names: dict[str, str]) -> str:
    return text.replace("=W", f"={names['weight']}").replace("=A", f"={names['activation']}")


def perplexities(
    model: Any, program: Program, batches: Batches, test: list[Tensor], kind: str, names: dict[str, str]
) -> Iterator[tuple[str, float]]:
    """Perplexity by the paper's name of the algorithm, one after the other."""
    for name, text in pipelines(GPTQ[kind]).items():
        lowered = Pipeline.parse(filled(f"{text} | {LOWER}", names)).run(program, batches)
        yield name, evaluate(mxcompile.deploy(lowered, model, check=False), test).perplexity
    lowered = reversed_order(program, batches, GPTQ[kind], names)
    yield "GPTQ, then AWQ", evaluate(mxcompile.deploy(lowered, model, check=False), test).perplexity


def main() -> None:
    parser = accuracy.parser(__doc__)
    parser.set_defaults(formats="mxint4,mxint6,mxint8,mxfp4,mxfp6_e2m3,mxfp8_e4m3")
    parser.add_argument("--blocks", default="16,32,128")
    parser.add_argument("--gptq", default="paper,ours", help="which GPTQ: paper, ours or both")
    arguments = parser.parse_args()
    model, tokenizer = smollm2.load()
    model = model.to(arguments.device)
    batches, test = accuracy.texts(arguments, tokenizer)
    program = mxcompile.trace(model, {"input_ids": batches[0]["input_ids"][:1, :64]})
    print(f"float {evaluate(model, test).perplexity:.3f}", flush=True)
    choices = itertools.product(arguments.formats.split(","), arguments.blocks.split(","), arguments.gptq.split(","))
    for fmt, block, kind in choices:
        activation = "mxint8" if "int" in fmt else "mxfp8_e4m3"
        names = {"weight": f"{fmt}:{block}", "activation": f"{activation}:{block}"}
        row = {n: round(p, 3) for n, p in perplexities(model, program, batches, test, kind, names)}
        report(names, kind, row, accuracy.described(arguments, batches, test), arguments.out)


def report(names: dict[str, str], kind: str, row: dict[str, float], about: dict[str, Any], out: Path | None) -> None:
    """One line, and in words whether the paper's ranking holds."""
    found = [row[name] for name in WORST_TO_BEST]
    agrees = all(before >= after for before, after in itertools.pairwise(found)) and min(row.values()) == found[-1]
    worse = row["GPTQ, then AWQ"] > row["AWQ+GPTQ"]
    print(f"{names['weight']:14} {kind:5} " + "  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    verdicts = {"AWQ+GPTQ best, GPTQ better than RTN": agrees, "reversed order worse": worse}
    print(" " * 20, "; ".join(f"{what}: {'yes' if holds else 'no'}" for what, holds in verdicts.items()), flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({**names, "gptq": kind, "perplexity": row, **about}) + "\n")


if __name__ == "__main__":
    main()
