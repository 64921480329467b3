"""What an order of channels changes, with random orders as the control, and paired over test windows.

    python benchmarks/permute.py --variant planted --behind "gptq{format=W,activation=A}" --out FILE

SmolLM2-135M, texts as in `accuracy.py`. `behind` are the passes between the permutation and `lower-mx`. `kl` is the
mean KL(float || quantized) in nats; `change` the mean over windows of its difference to the same passes without a
permutation, and `standard_error` that of this mean. `random{seed=N}` puts channels in a random order. `orders` may be
other passes too: `fine-blocks{element=W}`; `bits` are those of a weight, with scales.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from accuracy import LOWER, VARIANTS, described, parser, texts, write
from random_order import RandomOrder
from stream_orders import StreamOrder
from torch import Tensor, nn

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.cli import smollm2
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.formats import MXFormat, parse_format
from mxcompile.graph.program import Program
from mxcompile.passes import PASSES
from mxcompile.pipeline.pipeline import Pipeline

ORDERS: Final = "none,random{seed=0},random{seed=1},random{seed=2},permute{by=weight},permute{by=activation}"


def main() -> int:
    arguments = options()
    model, tokenizer = smollm2.load()
    model = VARIANTS[arguments.variant](model).to(arguments.device)
    batches, test = texts(arguments, tokenizer)
    program = mxcompile.trace(model, {"input_ids": batches[0]["input_ids"][:1, :64]})
    exact = torch.tensor([evaluate(model, window).nll for window in test])
    weight, activation = arguments.formats.split("/" if "/" in arguments.formats else ":")
    plain: Tensor | None = None
    for order in arguments.orders.split(","):
        first = "" if order == "none" else f"{order} | "
        text = (first + arguments.behind + LOWER).replace("=W", f"={weight}").replace("=A", f"={activation}")
        pipeline = Pipeline.parse(text.replace(";", ","), passes=[RandomOrder, StreamOrder, *PASSES.values()])
        began = time.perf_counter()
        lowered = pipeline.run(program, batches)
        quantized = mxcompile.deploy(lowered, model, check=False)
        seconds = time.perf_counter() - began
        scores = per_window(quantized, model, test)
        plain = scores if plain is None else plain
        row: dict[str, Any] = {"model": f"SmolLM2-135M-Instruct {arguments.variant}".strip(), "order": order}
        row |= {"behind": arguments.behind, "weight": weight, "activation": activation}
        row |= {"bits": round(bits_a_weight(program, lowered.formats, parse_format(weight)), 3)}
        row |= measured(scores, plain) | {"float_nll": round(float(exact.mean()), 4)}
        write(row | described(arguments, batches, test) | {"seconds": round(seconds, 1)}, arguments.out)
    return 0


def bits_a_weight(program: Program, chosen: Mapping[str, MXFormat | None], default: MXFormat) -> float:
    """Bits of all quantized weights, with scales, over their number."""
    shapes = {matmul.parameter: program.stored(matmul.parameter).shape for matmul in choose(program).matmuls}
    formats = {name: chosen.get(name, default) or default for name in shapes}
    total = sum(formats[name].storage_bytes(shape[:-1].numel(), shape[-1]) for name, shape in shapes.items())
    return 8 * total / sum(shape.numel() for shape in shapes.values())


def per_window(quantized: nn.Module, model: nn.Module, test: Sequence[Tensor]) -> Tensor:
    """(negative log-likelihood, KL) of every window, `[windows, 2]`."""
    results = [evaluate(quantized, window, model) for window in test]
    return torch.tensor([[result.nll, result.kl] for result in results], dtype=torch.float64)


def measured(scores: Tensor, plain: Tensor) -> dict[str, Any]:
    nll, kl = scores.mean(0).tolist()
    change = scores[:, 1] - plain[:, 1]
    error = change.std().item() / len(change) ** 0.5 if len(change) > 1 else 0.0
    rounded = {"nll": nll, "kl": kl, "change": change.mean().item(), "standard_error": error}
    by_window = [round(number, 4) for number in scores[:, 1].tolist()]
    return {name: round(number, 4) for name, number in rounded.items()} | {"kl_by_window": by_window}


def options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--orders", default=ORDERS, help="comma-separated; ; between options of a pass")
    options.add_argument("--behind", default="round-weights{format=W}", help="passes, ; or , between options")
    options.set_defaults(windows=8, length=512, calibration=16)
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(main())
