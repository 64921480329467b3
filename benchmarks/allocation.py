"""Mixed formats at equal bytes: those that `allocate` chooses, beside choices by rules of thumb.

    python benchmarks/allocation.py --bits 4.5,5,6 --out benchmarks/results/allocation.jsonl
    python benchmarks/allocation.py --random 20 --out benchmarks/results/allocation.jsonl

SmolLM2-135M. `bits` are stored bits a weight, scales included. The rules give 8 bits to as many items (what `allocate`
gives one format: q, k, v; o; gate, up; down) as fit into the same bytes, and 4 to the others: from the first layer on,
from the last one back, `down_proj` and then the others from the first layer on, or those with the least SQNR in 4 bits
under the importance of their input channels. Behind each: rounding to nearest, or the recipe (`--behind`).

`--random N`: KL as `allocate` predicts it and as it is measured, of N random choices at random budgets.
"""

import argparse
import json
import math
import random
import time
from functools import partial
from typing import Any, Final

import accuracy
import torch
from torch import Tensor

import mxcompile
from mxcompile.analysis.budget import Limit, choose_under_budget
from mxcompile.analysis.format_items import FormatItem, find_items
from mxcompile.calibration.quantizers import round_input
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import Request, Runner, gather_statistics, visible_outputs
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.cli import smollm2
from mxcompile.formats import MXFormat, parse_format
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.numerics.metrics import kl_divergence, negative_log_likelihood, rounding_db
from mxcompile.passes.writing import choose, finite_rows
from mxcompile.pipeline.pipeline import Pipeline

BEHIND: Final = {
    "rtn": "round-weights{format=W}",
    "gptq": "gptq{format=W,activation=A,correction=0.25}",
    "recipe": accuracy.ALGORITHMS["awq-fold + gptq + tune-vectors"],
    "recipe, no fold": accuracy.ALGORITHMS["gptq + tune-vectors"],
    "recipe, rotated": accuracy.ALGORITHMS["awq-fold + rotate + gptq + tune-vectors"],
}
ROUNDING: Final = ("gptq", "round-weights")
TRAINING: Final = "tune-vectors"


class Comparison:
    """SmolLM2 in front of the pass that rounds, the items' costs, and what a choice of formats measures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model, tokenizer = smollm2.load()
        self.model.to(arguments.device)
        self.exact: list[Tensor] = []
        self.batches, self.test = accuracy.texts(arguments, tokenizer)
        self.formats = [parse_format(name) for name in arguments.formats.split(",")]
        program = mxcompile.trace(self.model, {"input_ids": self.batches[0]["input_ids"][:1, :64]})
        passes = [part.strip() for part in self._filled(BEHIND[arguments.behind]).split(" | ")]
        cut = next(index for index, part in enumerate(passes) if part.startswith(ROUNDING))
        self.program = self._run(program, passes[:cut])
        self.passes = passes[cut:]
        self.items = find_items(self.program, self.formats[0], {}).free

    def _filled(self, text: str) -> str:
        return text.replace("=W", f"={self.arguments.formats.split(',')[0]}").replace(
            "=A", f"={self.arguments.activation}"
        )

    def _run(self, program: Program, passes: list[str]) -> Program:
        """Run passes one by one: those that train take a step for each batch, for others batches are larger."""
        windows = torch.cat([batch["input_ids"] for batch in self.batches])
        large = [{"input_ids": part} for part in windows.split(16)]
        for text in passes:
            program = Pipeline.parse(text).run(program, self.batches if text.startswith(TRAINING) else large)
        return program

    def costs(self) -> Tensor:
        """Costs `[items, formats]` as `allocate` estimates them."""
        arguments, began = self.arguments, time.perf_counter()
        options = f"formats=[{arguments.formats}],bits=16,activation={arguments.activation},score={arguments.score}"
        text = f"allocate{{{options},windows={arguments.score_windows}}}"
        (record,) = Pipeline.parse(text).run(self.program, self.batches).ledger[-1:]
        self.seconds = time.perf_counter() - began
        return torch.tensor([list(item.costs.values()) for item in record.allocation.items], dtype=torch.float64)

    def sizes(self) -> Tensor:
        return torch.tensor([[item.stored_bytes(fmt) for fmt in self.formats] for item in self.items]).double()

    @property
    def values(self) -> int:
        return sum(item.values for item in self.items)

    def measured(self, chosen: dict[str, MXFormat]) -> dict[str, float]:
        """Perplexity and KL of a choice of formats by weight: rounded weights, inputs rounded on the way."""
        program = self.program.copy()
        program.formats = dict(chosen)
        program = self._run(program, self.passes)
        rounding = partial(round_input, parse_format(self.arguments.activation))
        scores = self._scores(AlteredRun(program, dict.fromkeys(choose(program).matmuls, rounding)), program)
        numbers = {name: round(value, 5) for name, value in scores.items()}
        return numbers | {"perplexity": round(math.exp(scores["nll"]), 3)}

    def _scores(self, runner: Runner, program: Program) -> dict[str, float]:
        """Means over the predicted tokens of all test windows."""
        sums, tokens = torch.zeros(3, dtype=torch.float64), 0
        for index, window in enumerate(self.test):
            if index == len(self.exact):
                self.exact.append(self._logits(Runner(self.program), self.program, window))
            logits, targets = self._logits(runner, program, window), window[0, 1:]
            nll = [negative_log_likelihood(each, targets) for each in (logits, self.exact[index])]
            sums += torch.tensor([*nll, kl_divergence(self.exact[index], logits) * len(targets)])
            tokens += len(targets)
        return dict(zip(("nll", "float_nll", "kl"), (sums / tokens).tolist(), strict=True))

    @staticmethod
    def _logits(runner: Runner, program: Program, window: Tensor) -> Tensor:
        """The predictions `[tokens - 1, vocabulary]`."""
        return visible_outputs(runner, program, Inputs((), {"input_ids": window}))["logits"][0, :-1]

    def rules(self) -> dict[str, list[FormatItem]]:
        """The order in which each rule gives 8 bits."""
        down = [item for item in self.items if "down_proj" in item.weights[0]]
        return {
            "first layers": [*self.items],
            "last layers": [*reversed(self.items)],
            "down_proj": [*down, *(item for item in self.items if item not in down)],
            "worst layers": sorted(self.items, key=self._least_db()),
        }

    def _least_db(self) -> Any:
        matmuls = [matmul for item in self.items for matmul in item.matmuls]
        requests = {m: Request(m.activation.name, ChannelImportance) for m in matmuls}
        statistics = self.program.copy()
        gather_statistics(statistics, [*requests.values()], [Inputs((), dict(batch)) for batch in self.batches[:4]])
        low = self.formats[0]

        def db(matmul: Any) -> float:
            return rounding_db(finite_rows(statistics, matmul), low, requests[matmul].result(statistics))

        return lambda item: min(map(db, item.matmuls))


def by_rule(order: list[FormatItem], formats: list[MXFormat], budget: float) -> dict[str, MXFormat]:
    """The largest format for items in order while it fits into the budget, the smallest for the others."""
    low, high = formats[0], formats[-1]
    rest = budget - sum(item.stored_bytes(low) for item in order)
    chosen: dict[str, MXFormat] = {}
    for item in order:
        more = item.stored_bytes(high) - item.stored_bytes(low)
        fits = more <= rest
        rest -= more if fits else 0
        chosen |= dict.fromkeys(item.weights, high if fits else low)
    return chosen


def spearman(one: list[float], other: list[float]) -> float:
    """The rank correlation of numbers without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = accuracy.parser(__doc__)
    parser.set_defaults(formats="mxint4,mxint6,mxint8", windows=8, length=1024, calibration=32)
    parser.add_argument("--activation", default="mxint8")
    parser.add_argument("--bits", default="4.5,5,6", help="stored bits a weight, comma-separated")
    parser.add_argument("--behind", default="rtn", choices=BEHIND)
    parser.add_argument("--choices", default="allocate,first layers,last layers,down_proj,worst layers")
    parser.add_argument("--score", default="fisher", choices=("fisher", "noise", "kl"))
    parser.add_argument("--score-windows", type=int, default=16)
    parser.add_argument("--random", type=int, default=0, help="random choices, predicted and measured")
    arguments = parser.parse_args()
    comparison = Comparison(arguments)
    row: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "formats": arguments.formats}
    row |= {"activation": arguments.activation, "behind": arguments.behind, "score": arguments.score}
    row |= {"score_windows": arguments.score_windows}
    described = accuracy.described(arguments, comparison.batches, comparison.test)
    if arguments.random:
        predict(comparison, row, described)
    else:
        compare(comparison, row, described)


def compare(comparison: Comparison, row: dict[str, Any], described: dict[str, Any]) -> None:
    """A record for every budget and choice."""
    arguments, values, sizes = comparison.arguments, comparison.values, comparison.sizes()
    names = arguments.choices.split(",")
    costs = comparison.costs() if "allocate" in names else sizes * 0
    rules = comparison.rules() if names != ["allocate"] else {}
    for bits in map(float, arguments.bits.split(",")):
        for name in names:
            if name == "allocate":
                choice = choose_under_budget(costs, [Limit(sizes, bits * values / 8)])
                picked = [comparison.formats[option] for option in choice.options]
                chosen = {w: f for item, f in zip(comparison.items, picked, strict=True) for w in item.weights}
                extra = {"predicted_kl": round(choice.cost, 5), "score_seconds": round(comparison.seconds, 1)}
            else:
                chosen, extra = by_rule(rules[name], comparison.formats, bits * values / 8), {}
            size = sum(item.stored_bytes(chosen[item.weights[0]]) for item in comparison.items)
            numbers = {"choice": name, "bits": bits, "bytes": size, **comparison.measured(chosen), **extra}
            accuracy.write(row | numbers | described, arguments.out)


def predict(comparison: Comparison, row: dict[str, Any], described: dict[str, Any]) -> None:
    """One record: KL predicted and measured, their rank correlation, and the slope of the regression through zero."""
    arguments, costs, draw = comparison.arguments, comparison.costs(), random.Random(0)
    predicted: list[float] = []
    measured: list[float] = []
    for _ in range(arguments.random):
        share = draw.random()
        options = [draw.randrange(len(comparison.formats)) if draw.random() < share else 0 for _ in comparison.items]
        picked = [comparison.formats[option] for option in options]
        chosen = {w: f for item, f in zip(comparison.items, picked, strict=True) for w in item.weights}
        predicted.append(float(costs.gather(1, torch.tensor(options)[:, None]).sum()))
        measured.append(comparison.measured(chosen)["kl"])
        print(json.dumps({"predicted": round(predicted[-1], 5), "measured": measured[-1]}), flush=True)
    slope = sum(map(math.prod, zip(predicted, measured, strict=True))) / sum(value**2 for value in predicted)
    numbers = {
        "random": arguments.random,
        "spearman": round(spearman(predicted, measured), 4),
        "slope": round(slope, 4),
    }
    pairs = {"predicted": [round(value, 5) for value in predicted], "measured": measured}
    accuracy.write(row | numbers | pairs | {"score_seconds": round(comparison.seconds, 1)} | described, arguments.out)


if __name__ == "__main__":
    main()
