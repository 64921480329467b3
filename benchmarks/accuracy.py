"""How much of the loss of rounding to nearest each algorithm recovers, on text that calibration has not seen.

    python benchmarks/accuracy.py --formats mxint4:mxint8 --out benchmarks/results/accuracy.jsonl

SmolLM2-135M. Text: Python's help topics, calibration on their first half, test windows from their second; or files.
`nll` is the mean negative log-likelihood a token, in nats. `gap_closed` is the share recovered of the gap between the
float model (`float_nll`) and rounding to nearest with OCP's scales (`rtn_nll`). Only the tokens that a search samples
and the factors of `--variant` are random, with seed 0.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from variants import plant, plant_hidden, take_off_grid

import mxcompile
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text, read_text
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.formats import parse_format
from mxcompile.pipeline.pipeline import Pipeline

FLOOR: Final = "round-weights{format=W,rule=floor}"
ALGORITHMS: Final = {
    "rtn": "round-weights{format=W}",
    "rtn weighted": "round-weights{format=W,weighted=true}",
    "smooth-quant": "smooth-quant | round-weights{format=W}",
    "smooth-quant searched": "smooth-quant{alpha=none,weight=W,activation=A} | round-weights{format=W}",
    "awq-fold": "awq-fold{weight=W,activation=A} | round-weights{format=W}",
    "gptq": "gptq{format=W,activation=A}",
    "awq-fold + gptq": "awq-fold{weight=W,activation=A} | gptq{format=W,activation=A,correction=0.25}",
    "awq-fold + gptq + tune-vectors": "awq-fold{weight=W,activation=A} | gptq{format=W,activation=A,correction=0.25}"
    " | tune-vectors{activation=A}",
    "awq-fold + rotate + gptq": "awq-fold{weight=W,activation=A} | rotate{weight=W,activation=A}"
    " | gptq{format=W,activation=A,correction=0.25}",
    "awq-fold + rotate + gptq + tune-vectors": "awq-fold{weight=W,activation=A} | rotate{weight=W,activation=A}"
    " | gptq{format=W,activation=A,correction=0.25} | tune-vectors{activation=A}",
    "gptq + tune-vectors": "gptq{format=W,activation=A,correction=0.25} | tune-vectors{activation=A}",
}
LOWER: Final = " | lower-mx{weight=W,activation=A}"
HALVES: Final = {"first": slice(None, 1), "second": slice(1, None), "all": slice(None)}
VARIANTS: Final[dict[str, Callable[[nn.Module], nn.Module]]] = {
    "": lambda model: model,
    "planted": plant,
    "planted-hidden": plant_hidden,
    "off-grid": take_off_grid,
    "off-grid-planted": lambda model: plant(take_off_grid(model)),
}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    model, tokenizer = smollm2.load()
    model = VARIANTS[arguments.variant](model).to(arguments.device)
    batches, test = texts(arguments, tokenizer)
    program = mxcompile.trace(model, {"input_ids": batches[0]["input_ids"][:1, :64]})
    exact = evaluate(model, test).nll

    def measured(text: str, weight: str, activation: str) -> tuple[float, float]:
        """(negative log-likelihood a token, seconds of the pipeline)."""
        filled = (text + LOWER).replace("=W", f"={weight}").replace("=A", f"={activation}").replace(";", ",")
        began = time.perf_counter()
        lowered = Pipeline.parse(filled).run(program, batches)
        seconds = time.perf_counter() - began
        return evaluate(mxcompile.deploy(lowered, model, check=False), test).nll, seconds

    for pair in arguments.formats.split(","):
        weight, activation = pair.split("/") if "/" in pair else pair.split(":")
        floor, _ = measured(FLOOR, weight, activation)
        for name in arguments.algorithms.split(","):
            nll, seconds = measured(ALGORITHMS.get(name, name), weight, activation)
            row: dict[str, Any] = {"model": f"SmolLM2-135M-Instruct {arguments.variant}".strip(), "recipe": name}
            row |= {"weight": weight, "activation": activation, "block": parse_format(weight).block_size}
            row |= {"nll": round(nll, 4), "float_nll": round(exact, 4), "rtn_nll": round(floor, 4)}
            row |= {"gap_closed": round((floor - nll) / (floor - exact), 3), "perplexity": round(math.exp(nll), 3)}
            write(row | described(arguments, batches, test) | {"seconds": round(seconds, 1)}, arguments.out)


def write(row: dict[str, Any], out: Path | None) -> None:
    """Print a record, and append it to a file."""
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(
        "--formats",
        default="mxint4:mxint8",
        help="weight:activation (weight/activation, to give block sizes), comma-separated",
    )
    parser.add_argument(
        "--algorithms", default="rtn,smooth-quant,awq-fold,gptq,awq-fold + gptq,awq-fold + gptq + tune-vectors",
        help="comma-separated: names, or passes in front of lower-mx with W and A for formats and ; between options",
    )  # fmt: skip
    parser.add_argument(
        "--variant", choices=VARIANTS, default="", help="change the weights first, and not the function"
    )
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--calibration-text", type=Path, help="a .txt file, or a .jsonl file with one text a line")
    parser.add_argument("--test-text", type=Path, help="likewise; default: Python's help topics")
    parser.add_argument("--test-half", choices=HALVES, default="second", help="which half of the test text")
    parser.add_argument("--windows", type=int, default=16, help="test windows")
    parser.add_argument("--length", type=int, default=2048, help="tokens a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def texts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """(calibration batches of four windows, test windows)."""
    own = arguments.test_text is None
    test_ids = token_ids(tokenizer, help_text() if own else read_text(arguments.test_text))
    halves = test_ids.chunk(2)
    if own and (arguments.test_half != "second" or arguments.calibration_text):
        sys.exit("without --test-text, calibration takes the first half of the help topics and the test the second")
    calibration = halves[0] if own else token_ids(tokenizer, read_text(arguments.calibration_text))
    part = torch.cat(halves[HALVES[arguments.test_half]]).to(arguments.device)
    windows = list(token_windows(calibration.to(arguments.device), 512, arguments.calibration, tokenizer=tokenizer))
    batches = [{"input_ids": torch.cat(windows[i : i + 4])} for i in range(0, len(windows), 4)]
    return batches, list(islice(token_windows(part, arguments.length, tokenizer=tokenizer), arguments.windows))


def described(arguments: argparse.Namespace, batches: list[dict[str, Tensor]], test: list[Tensor]) -> dict[str, Any]:
    windows = sum(len(batch["input_ids"]) for batch in batches)
    names = [arguments.test_text, arguments.calibration_text]
    test_name, calibration_name = (path.name if path else "help topics" for path in names)
    return {
        "text": f"{test_name}, {arguments.test_half} half",
        "tokens": sum(window.shape[1] for window in test),
        "length": arguments.length,
        "calibration": f"{calibration_name}, {windows}x512",
        "seed": 0,
        "device": arguments.device,
    }


if __name__ == "__main__":
    main()
