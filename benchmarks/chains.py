"""What each step of a pipeline adds, on both halves of a text: chains of passes, scored after every step that rounds.

    python benchmarks/chains.py --formats mxint4:mxint8 --calibration 128 --test-text wikitext2-validation.txt \
        --calibration-text c4.jsonl "recipe: gptq{format=W,activation=A} || tune-vectors{activation=A}"

SmolLM2-135M. A chain is a name and steps with `||` between them, `NAME: PASSES || PASSES`; a step is passes without
`lower-mx`, with W and A for the formats: those of `--formats`, or named behind the name, `NAME [mxfp4:mxfp4]: ...`.
Steps with which several chains begin run once. Steps that train (`distill`, `tune-vectors`) see `--train-windows`
windows of 512 tokens in batches of 4, others `--calibration` in batches of 16; those that do not round,
`--fold-windows`. A record has the negative log-likelihood and the KL divergence from the float model, in nats, on
windows of the text's first half (`--windows-first`) and second half, and both of each window.
"""

import argparse
import time
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any, Final

import torch
from accuracy import LOWER, parser, write
from torch import Tensor, nn

import mxcompile
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.diagnostics.evaluation import score_windows
from mxcompile.graph.program import Program
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.weight import MXWeight

TRAINS: Final = {"distill", "tune-vectors"}
Batches = list[dict[str, Tensor]]


class Chains:
    """Programs by the steps that made them; the texts, and the float model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        loaded, tokenizer = smollm2.load()
        self.model: nn.Module = loaded.to(arguments.device)
        texts = (read_text(path) for path in (arguments.calibration_text, arguments.test_text))
        calibration, test = (token_ids(tokenizer, text).to(arguments.device) for text in texts)
        most = max(arguments.calibration, arguments.train_windows)
        windows = torch.cat([*token_windows(calibration, 512, most, tokenizer=tokenizer)])
        self.rounding = batches(windows[: arguments.calibration], 16)
        self.folding = batches(windows[: arguments.fold_windows or arguments.calibration], 16)
        self.training = batches(windows[: arguments.train_windows], 4)
        counts = {"first": arguments.windows_first, "second": arguments.windows}
        self.halves = {
            name: list(islice(token_windows(part, arguments.length, tokenizer=tokenizer), counts[name]))
            for name, part in zip(counts, test.chunk(2), strict=True)
        }
        self.programs: dict[tuple[str, ...], Program] = {
            (): mxcompile.trace(self.model, {"input_ids": windows[:1, :64]})
        }

    def run(self, chain: "Chain") -> None:
        """Run the steps of a chain that no other has run, and write their records."""
        for count in range(1, len(chain.steps) + 1):
            key = chain.steps[:count]
            if key in self.programs:
                continue
            pipeline, began = Pipeline.parse(chain.steps[count - 1]), time.perf_counter()
            trains = any(each.name in TRAINS for each in pipeline.passes)
            torch.backends.cuda.matmul.allow_tf32 = trains and self.arguments.tf32
            rounds = any(each.gives is not None for each in pipeline.passes)
            data = self.training if trains else self.rounding if rounds else self.folding
            program = pipeline.run(self.programs[key[:-1]], data)
            torch.backends.cuda.matmul.allow_tf32 = False
            self.programs[key] = program
            seconds = time.perf_counter() - began
            print(f"{chain.name}: {pipeline}: {seconds:.1f} s", flush=True)
            if program.rounded:
                self._record(chain, count, program, seconds)

    def _record(self, chain: "Chain", count: int, program: Program, seconds: float) -> None:
        pipeline = Pipeline.parse(" | ".join([*chain.steps[:count], chain.lower]))
        lowered = Pipeline(pipeline.passes[-1:]).run(program, self.rounding)
        module = mxcompile.deploy(lowered, self.model, check=False)
        trained = any(each.name in TRAINS for each in pipeline.passes)
        row: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "recipe": chain.name}
        row |= {"weight": chain.weight, "activation": chain.activation}
        row |= {"bits": stored_bits(module), "pipeline": str(pipeline), "seed": 0}
        row |= {"calibration": f"{self.arguments.calibration}x512", "device": self.arguments.device}
        row |= {"folded": f"{self.arguments.fold_windows}x512"} if self.arguments.fold_windows else {}
        row |= {"trained": f"{self.arguments.train_windows}x512"} if trained else {}
        row["halves"] = {half: scored(module, windows, self.model) for half, windows in self.halves.items()}
        write(row | {"seconds": round(seconds, 1)}, self.arguments.out)


@dataclass(frozen=True)
class Chain:
    """name: in records. steps: passes with the formats in place of W and A."""

    name: str
    weight: str
    activation: str
    steps: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, formats: str) -> "Chain":
        """Of `NAME [weight:activation]: PASSES || PASSES`, the formats in brackets if they are not those given."""
        name, _, steps = text.partition(": ")
        name, _, own = name.partition(" [")
        pair = (own or formats).removesuffix("]")
        weight, activation = pair.split("/" if "/" in pair else ":")
        return cls(
            name, weight, activation, tuple(filled(step.strip(), weight, activation) for step in steps.split("||"))
        )

    @property
    def lower(self) -> str:
        """The last pass of all steps."""
        return filled(LOWER.removeprefix(" | "), self.weight, self.activation)


def filled(text: str, weight: str, activation: str) -> str:
    """Passes with formats for W and A."""
    return text.replace("=W", f"={weight}").replace("=A", f"={activation}")


def scored(module: nn.Module, windows: list[Tensor], reference: nn.Module) -> dict[str, Any]:
    """Means over windows of equal length, and [nll, KL] of each, in nats a token."""
    rows = [[value / each.tokens for value in each.sums] for each in score_windows(module, windows, reference)]
    means = dict(zip(("nll", "kl", "top1", "float_nll"), map(fmean, zip(*rows, strict=True)), strict=True))
    numbers: dict[str, Any] = {key: round(value, 5) for key, value in means.items()}
    return numbers | {"windows": [[round(nll, 5), round(kl, 5)] for nll, kl, *_ in rows]}


def stored_bits(module: nn.Module) -> float:
    """Stored bits a weight of all MX weights, scales included."""
    packed = [each for each in module.parameters() if isinstance(each, MXWeight)]
    stored = sum(each.elements.numel() + each.scales.numel() for each in packed)
    return round(8 * stored / sum(each.numel() for each in packed), 4)


def batches(windows: Tensor, size: int) -> Batches:
    """Windows `[windows, tokens]` in batches."""
    return [{"input_ids": part} for part in windows.split(size)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("chains", nargs="+", metavar="NAME: PASSES || PASSES")
    options.add_argument("--fold-windows", type=int, help="windows that steps that do not round see: all by default")
    options.add_argument("--train-windows", type=int, default=128, help="windows that steps that train see")
    options.add_argument("--windows-first", type=int, default=8, help="test windows of the first half")
    options.add_argument("--tf32", action="store_true", help="train with products in TF32")
    arguments = options.parse_args()
    chains = Chains(arguments)
    for text in arguments.chains:
        chains.run(Chain.parse(text, arguments.formats))


if __name__ == "__main__":
    main()
