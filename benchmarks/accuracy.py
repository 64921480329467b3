"""What each algorithm saves of what rounding costs: mean negative log-likelihood on text that calibration has not seen.

    python benchmarks/accuracy.py --formats mxint4:mxint8 --out benchmarks/results/accuracy.jsonl

SmolLM2-135M. Text: Python's help topics, calibration from their first half, test windows from their second. `closes` is
the share of the gap between plain rounding and float that is closed. Seeds are fixed: two runs give the same numbers.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any, Final

import mxcompile
from mxcompile import smollm2
from mxcompile.demo import help_text
from mxcompile.evaluation import evaluate, token_windows
from mxcompile.pipeline import Pipeline

ALGORITHMS: Final = {
    "rtn": "round-weights{{format={weight}}}",
    "rtn weighted": "round-weights{{format={weight},weighted=true}}",
    "smooth-quant": "smooth-quant | round-weights{{format={weight}}}",
    "awq-fold": "awq-fold{{weight={weight},activation={activation}}} | round-weights{{format={weight},weighted=true}}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="mxint4:mxint8", help="weight:activation, comma-separated")
    parser.add_argument("--calibration", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=4, help="test windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a test window")
    parser.add_argument("--out", type=Path, help="add the results here, one JSON object a line")
    arguments = parser.parse_args()
    model, tokenizer = smollm2.load()
    ids = tokenizer(help_text(), return_tensors="pt").input_ids[0]
    batches = [{"input_ids": w} for w in token_windows(ids[: len(ids) // 2], 512, arguments.calibration)]
    test = list(islice(token_windows(ids[len(ids) // 2 :], arguments.length), arguments.windows))
    exact = evaluate(model, test).nll
    program = mxcompile.trace(model, batches[0])
    for pair in arguments.formats.split(","):
        weight, activation = pair.split(":")
        plain = None
        for name, text in ALGORITHMS.items():
            lower = " | lower-mx{{weight={weight},activation={activation}}}"
            pipeline = Pipeline.parse((text + lower).format(weight=weight, activation=activation))
            began = time.perf_counter()
            lowered = pipeline.run(program, batches)
            seconds = time.perf_counter() - began
            nll = evaluate(mxcompile.deploy(lowered, model, check=False), test).nll
            plain = nll if plain is None else plain
            row: dict[str, Any] = {"weight": weight, "activation": activation, "algorithm": name}
            row |= {"nll_float": round(exact, 4), "nll": round(nll, 4)}
            row |= {"closes": round((plain - nll) / (plain - exact), 3), "seconds": round(seconds, 1)}
            row |= {"test": f"{len(test)}x{arguments.length}", "calibration": f"{len(batches)}x512"}
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
