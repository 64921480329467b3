"""What training gains behind a rounding, on more text than the rounding needs: `distill` and `learn-rounding`.

    python benchmarks/learned.py --formats mxfp4:mxfp4 --rounding "rotate{weight=W;activation=A} | gptq{format=W}" \
        --training "distill{activation=A;train=weights}" --test-text validation.txt --calibration-text c4.jsonl --tf32

SmolLM2-135M; texts as in `accuracy.py`. The passes of `--folding`, if any, see the first `--fold-windows` windows of
512 tokens, those of `--rounding` behind them `--calibration` windows in batches of `--rounding-batch`, those of
`--training` (several steps with `||` between them, a record each) as many as the text has, in batches of `--batch`,
with products in TF32 if `--tf32`. `help_nll` is that of Python's help topics, another domain; `losses` those of
held-out batches of `--training` along the steps. W and A stand for the formats. `--rtn-nll`: the loss of rounding to
nearest, if it has been measured; `--last`: a record after the last step alone; `--apart`: each step of `--training`
begins at the rounding; `--until`: for each of these the time (`date +%s`) by which it is to be scored: steps=S becomes
as many steps as fit, by ten of them.
"""

import argparse
import math
import re
import sys
import time
from itertools import islice, pairwise
from statistics import fmean, median
from typing import Any

import torch
from accuracy import FLOOR, LOWER, described, parser, texts, write
from torch import Tensor, nn

import mxcompile
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.graph.program import Program
from mxcompile.pipeline.pipeline import Pipeline

SCORING_SECONDS = 12
Batches = list[dict[str, Tensor]]


class Scores:
    """Scores programs on the test text and the help topics. text: as `accuracy.py` describes it."""

    def __init__(self, model: nn.Module, test: list[Tensor], helps: list[Tensor]) -> None:
        self._model, self._test, self._helps = model, test, helps
        self.exact, self.exact_help = (evaluate(model, windows).nll for windows in (test, helps))

    def of(self, program: Program, lower: str, batches: Batches) -> dict[str, float]:
        """Negative log-likelihoods a token once the program is lowered."""
        quantized = mxcompile.deploy(Pipeline.parse(lower).run(program, batches), self._model, check=False)
        return {"nll": evaluate(quantized, self._test).nll, "help_nll": evaluate(quantized, self._helps).nll}


def main() -> int:
    a = options()
    model, tokenizer = smollm2.load()
    model = model.to(a.device)
    rounding = a.calibration
    a.calibration = max(a.train_windows, rounding)
    batches, test = texts(a, tokenizer)
    windows = torch.cat([batch["input_ids"] for batch in batches])
    help_ids = token_ids(tokenizer, help_text()[200_000:400_000]).to(a.device)
    scores = Scores(model, test, list(islice(token_windows(help_ids, a.length, tokenizer=tokenizer), 4)))
    program = mxcompile.trace(model, {"input_ids": windows[:2, :64]})
    weight, activation = a.formats.split("/" if "/" in a.formats else ":")
    names = {"=W": f"={weight}", "=A": f"={activation}", ";": ","}
    few, many = in_batches(windows[:rounding], a.rounding_batch), in_batches(windows, a.batch)
    lower = filled(LOWER.removeprefix(" | "), names)
    floor = a.rtn_nll or scores.of(Pipeline.parse(filled(FLOOR, names)).run(program, few), lower, few)["nll"]
    began, done = time.perf_counter(), [a.folding] if a.folding else []
    if a.folding:
        folding = in_batches(windows[: a.fold_windows], a.batch)
        program = Pipeline.parse(filled(a.folding, names)).run(program, folding)
    seconds, texts_of_steps = time.perf_counter() - began, [a.rounding, *filter(None, a.training.split("||"))]
    rounded, rounding_seconds, count = program, 0.0, len(done) + 1
    for index, step in enumerate(texts_of_steps):
        torch.backends.cuda.matmul.allow_tf32 = bool(index) and a.tf32
        if a.apart and index > 1:
            program, seconds, done = rounded, rounding_seconds, done[:count]
        text = fitted(step, names, program, many, a.until[index - 1]) if index and a.until else step
        began = time.perf_counter()
        program = Pipeline.parse(filled(text, names)).run(program, many if index else few)
        seconds, done = seconds + time.perf_counter() - began, [*done, text.strip()]
        if not index:
            rounded, rounding_seconds = program, seconds
        torch.backends.cuda.matmul.allow_tf32 = False
        print(f"{text.strip()}: {seconds:.1f} s", file=sys.stderr, flush=True)
        if a.last and (not index if a.apart else index + 1 < len(texts_of_steps)):
            continue
        scored = scores.of(program, lower, few)
        row = {"recipe": " | ".join(done), "weight": weight, "activation": activation, **scored, "rtn_nll": floor}
        row |= {"losses": held_out(program), "last_training_loss": last_training_loss(program)}
        row |= {"trained": f"{len(many) * a.batch if index else 0}x512", "seconds": round(seconds, 1)}
        write(compared(row, scores) | described(a, few, test), a.out)
    return 0


def compared(row: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """A record with the float model's losses and the share of the gap."""
    row = {"model": "SmolLM2-135M-Instruct", **row, "float_nll": scores.exact, "float_help_nll": scores.exact_help}
    row["gap_closed"] = (row["rtn_nll"] - row["nll"]) / (row["rtn_nll"] - scores.exact)
    row["perplexity"] = math.exp(row["nll"])
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def held_out(program: Program) -> list[list[float]]:
    """[step, loss] on held-out batches of the last pass, if it has trained the whole model."""
    curves = [curve for name, curve in program.ledger[-1].curves.items() if name.startswith("all")]
    return [[step, round(loss, 5)] for curve in curves for step, loss in curve.held_out]


def last_training_loss(program: Program) -> float | None:
    """The mean loss of the last twentieth of the steps of the last pass; with a larger one on held-out batches, more
    data would help."""
    curves = [curve for name, curve in program.ledger[-1].curves.items() if name.startswith("all")]
    losses = [loss for curve in curves for _, loss in curve.training]
    return round(fmean(losses[-max(1, len(losses) // 20) :]), 5) if losses else None


def in_batches(windows: Tensor, size: int) -> Batches:
    """Whole batches of windows `[windows, tokens]`."""
    return [{"input_ids": part} for part in windows.split(size) if len(part) == size]


def fitted(text: str, names: dict[str, str], program: Program, batches: Batches, until: float) -> str:
    """Passes with the number of steps for S that are done before a time, measured by ten of them."""
    starts, step = list[float](), Distillation._step

    def timed(self: Distillation, *of_step: Any) -> float | None:
        starts.append(time.perf_counter())
        return step(self, *of_step)

    Distillation._step = timed
    began, parts = time.perf_counter(), int(re.findall(r"snapshots=(\d+)", text)[0])
    trial = re.sub(r"snapshots=\d+", "snapshots=1", text.replace("=S", "=10"))
    Pipeline.parse(filled(trial, names)).run(program, batches)
    Distillation._step = step
    each = median(later - earlier for earlier, later in pairwise(starts))
    looking = (time.perf_counter() - began - 10 * each) / 2
    steps = int((until - time.time() - (1 + parts) * looking - SCORING_SECONDS) / each)
    print(
        f"{1e3 * each:.0f} ms a step, {looking:.1f} s to look at held-out batches: {steps}", file=sys.stderr, flush=True
    )
    return text.replace("=S", f"={max(steps, 1)}")


def filled(text: str, names: dict[str, str]) -> str:
    """Passes with the formats for W and A, and commas between options."""
    for name, value in names.items():
        text = text.replace(name, value)
    return text


def options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounding", default="gptq{format=W;activation=A;correction=0.25}", help="passes in front")
    options.add_argument("--folding", default="", help="passes in front of these")
    options.add_argument("--fold-windows", type=int, default=16, help="windows for --folding")
    options.add_argument("--training", default="distill{activation=A;train=weights}", help="passes with || between")
    options.add_argument("--train-windows", type=int, default=1024, help="most windows to train on")
    options.add_argument("--batch", type=int, default=4, help="windows a training batch")
    options.add_argument("--rounding-batch", type=int, default=16, help="windows a batch of --rounding")
    options.add_argument("--rtn-nll", type=float, help="measured loss of rounding to nearest")
    options.add_argument("--apart", action="store_true", help="each step of --training begins at the rounding")
    options.add_argument("--until", type=lambda text: [*map(float, text.split(","))], help="with commas between")
    options.add_argument("--last", action="store_true", help="score the last step alone")
    options.add_argument("--tf32", action="store_true", help="train with products in TF32")
    options.set_defaults(calibration=64)
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(main())
