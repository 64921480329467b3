"""How much of what planted outliers cost any order of channels could win back, even if every norm had its own.

    python benchmarks/order_limit.py --out benchmarks/results/order-limit.jsonl

SmolLM2-135M, planted (`variants.py`), on a window of Python's help topics. For the readers of every norm: the squared
error of their outputs, over that of the outputs, with weights and inputs rounded to nearest. A share of 1 would be the
error of the original model. `own` orders the channels of each norm by themselves: sorted by weights, by activations or
by their ratio, or exchanged while the expected error falls (`block_order.py`), from the best of these. A model has one
order for all norms, as the residual stream passes through all of them. `weights alone` and `inputs alone`: the errors
where nothing else is rounded, of the original and of the planted model.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from variants import norms_and_readers, plant

from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.calibration.quantizers import round_input
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.formats import MXFormat, ScaleRule, activation_rule, parse_format
from mxcompile.numerics.block_order import BlockErrors, RoundingErrors, exchanged
from mxcompile.numerics.importance import round_rows

SORTED: Final = {
    "weight": lambda x, w: w,
    "activation": lambda x, w: x,
    "ratio": lambda x, w: x / w,
}
ALONE: Final = ("weights alone", "inputs alone")
OWN: Final = (*SORTED, "exchanged")


class Norms:
    """What the readers of every norm lose, on the original or the planted model, on one window."""

    def __init__(self, planted: bool, window: Tensor, weight: MXFormat, activation: MXFormat) -> None:
        model = smollm2.load()[0]
        model = plant(model) if planted else model
        self.weight, self.activation = weight, activation
        readers = [pair for layer in model.model.layers for pair in norms_and_readers(layer)]
        seen: dict[Any, Tensor] = {}
        for norm, _ in readers:
            norm.register_forward_hook(lambda module, _, output: seen.update({module: output[0].detach()}))
        with torch.no_grad():
            model(window)
        self.pairs = [
            (seen[norm], torch.cat([linear.weight.detach() for linear in linears])) for norm, linears in readers
        ]

    def errors(self, names: Sequence[str]) -> dict[str, float]:
        """Means over norms: the error as channels are (`none`), in orders of their own, and of one operand alone."""
        sums = dict.fromkeys(names, 0.0)
        for x, w in self.pairs:
            for name in names:
                order = self._own(x, w, name) if name in OWN else torch.arange(len(w[0]))
                sums[name] += self._error(x[:, order], w[:, order], name) / len(self.pairs)
        return sums

    def _error(self, x: Tensor, w: Tensor, name: str) -> float:
        exact = x @ w.T
        w = w if name == "inputs alone" else round_rows(w.contiguous(), self.weight, ScaleRule.MSE)[0]
        x = x if name == "weights alone" else round_input(self.activation, x.contiguous())
        return float((x @ w.T - exact).square().sum() / exact.square().sum())

    def _own(self, x: Tensor, w: Tensor, name: str) -> Tensor:
        energies = x.square().mean(0), w.square().sum(0)
        orders = {key: score(*energies).argsort(descending=True) for key, score in SORTED.items()}
        if name != "exchanged":
            return orders[name]
        of_weights = RoundingErrors.of(self.weight, ScaleRule.MSE)
        of_inputs = RoundingErrors.of(self.activation, activation_rule(self.activation))
        expected = BlockErrors(energies[1][None], energies[0][None], of_weights, of_inputs, self.weight.block_size)
        return exchanged(expected, min(orders.values(), key=expected.total), [torch.arange(len(w[0]))])


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
    original = Norms(False, window, *formats).errors(("none", *ALONE))
    planted = Norms(True, window, *formats).errors(("none", *ALONE, *OWN))
    cost = planted["none"] - original["none"]
    row: dict[str, Any] = {"model": f"{smollm2.NAME} planted", "weight": arguments.weight}
    row |= {"activation": arguments.activation, "original": round(original["none"], 5)}
    row |= {"planted": round(planted["none"], 5)}
    row |= {f"own {name}": round((planted["none"] - planted[name]) / cost, 4) for name in OWN}
    row |= {name: [round(original[name], 5), round(planted[name], 5)] for name in ALONE}
    row |= {"text": "help topics", "tokens": arguments.length}
    print(json.dumps(row), flush=True)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
