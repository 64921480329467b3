"""The source paper's study (Sharify et al., arXiv 2405.07135), repeated and extended on SmolLM2-135M.

    python benchmarks/study.py --test-text wikitext2-validation.txt --calibration-text c4.jsonl --device cuda

{RTN, GPTQ, SmoothQuant, AWQ, SmoothQuant + GPTQ, AWQ + GPTQ} x weight formats x block sizes, with 8-bit activations of
the same kind (integer or float). GPTQ is the paper's (micro-block of 128, OCP scales) or ours. A pipeline refuses the
reversed order, a fold after GPTQ; here the rounded weights are declared float again, folded, and rounded to nearest.
(SmoothQuant always folds. Our AWQ search rejects factors that lose, so on weights already rounded it may fold nothing.)
Prints perplexities, one line for each format and block size, and in how many of them the paper's ranking holds.
`--table` prints the records of a file in this way.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import accuracy
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.graph.program import Program, Stage
from mxcompile.pipeline.pipeline import Pipeline

Batches = list[dict[str, Tensor]]
ROUND, LOWER = "round-weights{format=W,rule=floor}", "lower-mx{weight=W,activation=A}"
GPTQ = {
    "paper": "gptq{format=W,activation=A,order=none,rule=floor,microblock=128}",
    "ours": "gptq{format=W,activation=A,correction=0.25}",
}
FOLDS: Final = {"": None, "SmoothQuant": "smooth-quant", "AWQ": "awq-fold{weight=W,activation=A}"}
REVERSED: Final = {"GPTQ, SmoothQuant": FOLDS["SmoothQuant"], "GPTQ, AWQ": FOLDS["AWQ"]}
ALGORITHMS: Final = ("RTN", "GPTQ", "SmoothQuant", "AWQ", "SmoothQuant+GPTQ", "AWQ+GPTQ", *REVERSED)
VERDICTS: Final = {
    "GPTQ better than RTN": lambda row: row["GPTQ"] < row["RTN"],
    "AWQ+GPTQ better than GPTQ": lambda row: row["AWQ+GPTQ"] < row["GPTQ"],
    "AWQ+GPTQ better than AWQ": lambda row: row["AWQ+GPTQ"] < row["AWQ"],
    "AWQ+GPTQ best of all": lambda row: min(row.values()) == row["AWQ+GPTQ"],
    "AWQ after GPTQ worse than before it": lambda row: row["GPTQ, AWQ"] > row["AWQ+GPTQ"],
    "SmoothQuant after GPTQ worse than before it": lambda row: row["GPTQ, SmoothQuant"] > row["SmoothQuant+GPTQ"],
}
"""What the paper finds below 8 bits (its Tables 1 and 2)."""


class Study:
    """A model with its data: perplexities of algorithms for some formats."""

    def __init__(self, arguments: Any) -> None:
        model, tokenizer = smollm2.load()
        self.model = model.to(arguments.device)
        self.batches, self.test = accuracy.texts(arguments, tokenizer)
        self.program = mxcompile.trace(self.model, {"input_ids": self.batches[0]["input_ids"][:1, :64]})

    def perplexities(self, kind: str, names: dict[str, str]) -> Iterator[tuple[str, float]]:
        """(the paper's name of an algorithm, perplexity), one after the other; each fold runs once."""
        for fold, text in FOLDS.items():
            folded = self.program if text is None else self.run(text, self.program, names)
            for rounding, passes in {"RTN": ROUND, "GPTQ": GPTQ[kind]}.items():
                rounded = self.run(passes, folded, names)
                parts = [part for part in (fold, rounding) if part] if rounding == "GPTQ" or not fold else [fold]
                yield "+".join(parts), self.perplexity(rounded, names)
                if rounding == "GPTQ" and text is None:
                    for name, late in REVERSED.items():
                        yield name, self.perplexity(self.folded_late(rounded, f"{late} | {ROUND}", names), names)

    def folded_late(self, rounded: Program, text: str, names: dict[str, str]) -> Program:
        """A fold after GPTQ: the rounded weights are treated as float weights."""
        floats = rounded.copy()
        floats.stage = Stage.FLOAT
        floats.rounded.clear()
        return self.run(text, floats, names)

    def run(self, text: str, program: Program, names: dict[str, str]) -> Program:
        filled = text.replace("=W", f"={names['weight']}").replace("=A", f"={names['activation']}")
        return Pipeline.parse(filled).run(program, self.batches)

    def perplexity(self, rounded: Program, names: dict[str, str]) -> float:
        lowered = self.run(LOWER, rounded, names)
        return evaluate(mxcompile.deploy(lowered, self.model, check=False), self.test).perplexity


def main() -> None:
    parser = accuracy.parser(__doc__)
    parser.set_defaults(formats="mxint4,mxint6,mxint8,mxfp4,mxfp6_e2m3,mxfp8_e4m3")
    parser.add_argument("--blocks", default="16,32,128", help="block sizes, comma-separated: %(default)s")
    parser.add_argument("--gptq", default="paper,ours", help="which GPTQ, comma-separated: %(default)s")
    parser.add_argument("--table", type=Path, help="only print the records of this file")
    arguments = parser.parse_args()
    if arguments.table:
        show([json.loads(line) for line in arguments.table.read_text().splitlines()])
        return
    study = Study(arguments)
    exact = round(evaluate(study.model, study.test).perplexity, 3)
    choices = itertools.product(arguments.formats.split(","), arguments.blocks.split(","), arguments.gptq.split(","))
    rows: list[dict[str, Any]] = []
    for fmt, block, kind in choices:
        activation = "mxint8" if "int" in fmt else "mxfp8_e4m3"
        names = {"weight": f"{fmt}:{block}", "activation": f"{activation}:{block}"}
        measured = {name: round(value, 3) for name, value in study.perplexities(kind, names)}
        perplexity = {name: measured[name] for name in ALGORITHMS}
        rows.append({**names, "gptq": kind, "float": exact, "perplexity": perplexity})
        accuracy.write(rows[-1] | accuracy.described(arguments, study.batches, study.test), arguments.out)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and for each finding of the paper how many rows agree and which do not."""
    table = Table("weights", "GPTQ", *ALGORITHMS, title=f"perplexity; float {rows[0]['float']:.2f}")
    for row in rows:
        values = row["perplexity"]
        best = min(values.values())
        cells = [f"[bold]{v:.2f}[/]" if v == best else f"{v:.2f}" for v in (values[name] for name in ALGORITHMS)]
        table.add_row(row["weight"], row["gptq"], *cells)
    console = Console()
    console.print(table)
    for what, holds in VERDICTS.items():
        no = [f"{row['weight']} ({row['gptq']})" for row in rows if not holds(row["perplexity"])]
        console.print(f"{what}: {len(rows) - len(no)} of {len(rows)}" + (f"; not {', '.join(no)}" if no else ""))


if __name__ == "__main__":
    main()
