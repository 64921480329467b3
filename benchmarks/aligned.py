"""What aligning MXFP8 activations costs (`lower-mx{align=true}`): a language model's loss, and the error of a product.

    python benchmarks/aligned.py --out benchmarks/results/aligned.jsonl

SmolLM2-135M-Instruct, weights rounded to nearest, activations in mxfp8_e4m3, with and without alignment, on the second
half of Python's help topics. Roundings amplify any difference: `nudged` rows, the embedding times 1 + 2**-20, say how
much a difference of nothing comes to.

`output_error` is of a linear with normal weights and inputs, 2048 x 4096 by 4096 x 1024 in float32: |y - y'| over |y|
(root of the sums of squares), y of float values and y' of rounded ones; "channels apart": each channel of the inputs
times 10 to the power of a normal number. `aligned_alone`: y of rounded values, y' of aligned ones. `changed`: share of
rounded inputs that aligning changes. Seed 0.
"""

import argparse
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accuracy import write

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text, token_ids
from mxcompile.diagnostics.evaluation import evaluate, token_windows
from mxcompile.formats import MXFP8_E4M3, MXFormat, ScaleRule, activation_rule, parse_format
from mxcompile.numerics import reference
from mxcompile.pipeline.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default="mxfp4,mxint4", help="formats, comma-separated")
    parser.add_argument("--windows", type=int, default=8, help="test windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a test window")
    parser.add_argument("--out", type=Path, help="add the results here, one JSON object a line")
    arguments = parser.parse_args()
    for name in arguments.weights.split(","):
        for data in ("normal", "channels apart"):
            write(of_a_product(parse_format(name), data), arguments.out)
    of_a_model(arguments)


@torch.no_grad()
def of_a_product(weight: MXFormat, data: str) -> dict[str, Any]:
    """Errors of one linear."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 4096, generator=generator)
    x = torch.randn(2048, 4096, generator=generator)
    if data != "normal":
        x = x * 10 ** torch.randn(4096, generator=generator)
    y = x @ w.T
    rounded_w = reference.quantize_dequantize(w, weight, ScaleRule.MSE)
    rounded = reference.quantize_dequantize(x, MXFP8_E4M3, activation_rule(MXFP8_E4M3))
    aligned = reference.align(rounded)
    row: dict[str, Any] = {"data": data, "weight": str(weight), "activation": str(MXFP8_E4M3)}
    row["output_error"] = relative(rounded @ rounded_w.T, y)
    row["output_error_aligned"] = relative(aligned @ rounded_w.T, y)
    row["aligned_alone"] = relative(aligned @ rounded_w.T, rounded @ rounded_w.T)
    return row | {"changed": float(f"{(aligned != rounded).double().mean().item():.3g}"), "seed": 0}


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float(f"{((y.double() - exact.double()).norm() / exact.double().norm()).item():.4g}")


def of_a_model(arguments: argparse.Namespace) -> None:
    """Losses of SmolLM2."""
    model, tokenizer = smollm2.load()
    half = token_ids(tokenizer, help_text()).chunk(2)[1]
    test = list(islice(token_windows(half, arguments.length), arguments.windows))
    tokens = sum(window.shape[1] for window in test)
    program = mxcompile.trace(model, {"input_ids": test[0][:, :64]})
    exact = evaluate(model, test).nll
    for weight in arguments.weights.split(","):
        for align, nudged in ((False, False), (True, False), (False, True)):
            recipe = f"round-weights{{format={weight}}} | lower-mx{{weight={weight},activation=mxfp8_e4m3"
            recipe += ",align=true}" if align else "}"
            deployed = mxcompile.deploy(Pipeline.parse(recipe).run(program), model, check=False)
            if nudged:
                deployed.get_input_embeddings().weight.data *= 1 + 2.0**-20
            nll = evaluate(deployed, test).nll
            row: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "recipe": recipe, "nudged": nudged}
            row |= {"nll": round(nll, 5), "float_nll": round(exact, 5), "perplexity": round(math.exp(nll), 4)}
            row |= {"text": "help topics, second half", "tokens": tokens, "length": arguments.length, "seed": 0}
            write(row, arguments.out)


if __name__ == "__main__":
    main()
