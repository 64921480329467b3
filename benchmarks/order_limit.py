"""How much of what planted outliers cost any order of channels could win back, even if every norm had its own.

    python benchmarks/order_limit.py --out benchmarks/results/order-limit.jsonl

SmolLM2-135M, planted (`variants.py`), on a window of Python's help topics. For the readers of every norm: the squared
error of their outputs, over that of the outputs, with weights and inputs rounded to nearest. A share of 1 would be the
error of the original model. `own` sorts the channels of each norm by themselves, by weights, by activations, or by
their ratio; a model has one order for all norms, as the residual stream passes through all of them.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from variants import norms_and_readers, plant

from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.calibration.quantizers import round_input
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.formats import MXFormat, ScaleRule, parse_format
from mxcompile.numerics.importance import round_rows

ORDERS: Final = {
    "weight": lambda x, w: w,
    "activation": lambda x, w: x,
    "ratio": lambda x, w: x / w,
}


def errors(planted: bool, window: Tensor, weight: MXFormat, activation: MXFormat) -> dict[str, float]:
    """The error as channels are (`none`), and with each norm's channels in an order of its own; means over norms."""
    model = smollm2.load()[0]
    model = plant(model) if planted else model
    seen: dict[Any, Tensor] = {}
    readers = [pair for layer in model.model.layers for pair in norms_and_readers(layer)]
    for norm, _ in readers:
        norm.register_forward_hook(lambda module, _, output: seen.update({module: output[0].detach()}))
    with torch.no_grad():
        model(window)
    sums = dict.fromkeys(("none", *ORDERS), 0.0)
    for norm, linears in readers:
        x, w = seen[norm], torch.cat([linear.weight.detach() for linear in linears])
        energies = x.square().mean(0), w.square().sum(0)
        exact = x @ w.T
        for name in sums:
            order = torch.arange(len(w[0])) if name == "none" else ORDERS[name](*energies).argsort(descending=True)
            rounded = round_rows(w[:, order].contiguous(), weight, ScaleRule.MSE)[0]
            output = round_input(activation, x[:, order].contiguous()) @ rounded.T
            sums[name] += float((output - exact).square().sum() / exact.square().sum()) / len(readers)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weight", default="mxint4")
    parser.add_argument("--activation", default="mxint8")
    parser.add_argument("--length", type=int, default=256, help="tokens of the window")
    parser.add_argument("--out", type=Path, help="append the record to this file")
    arguments = parser.parse_args()
    ids = token_ids(smollm2.load_tokenizer(), help_text()[:20000])
    window = next(iter(token_windows(ids, arguments.length)))
    formats = parse_format(arguments.weight), parse_format(arguments.activation)
    original, planted = (errors(kind, window, *formats) for kind in (False, True))
    cost = planted["none"] - original["none"]
    row: dict[str, Any] = {"model": f"{smollm2.NAME} planted", "weight": arguments.weight}
    row |= {"activation": arguments.activation, "original": round(original["none"], 5)}
    row |= {"planted": round(planted["none"], 5)}
    row |= {f"own {name}": round((planted["none"] - planted[name]) / cost, 4) for name in ORDERS}
    row |= {"text": "help topics", "tokens": arguments.length}
    print(json.dumps(row), flush=True)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
