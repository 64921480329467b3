"""Options of passes chosen by measurement: pipelines with common first passes, side by side in several processes.

    python benchmarks/choices.py benchmarks/choices.toml --calibration-text c4.jsonl --test-text wikitext2.txt \\
        --device cuda --processes 8 --seconds 600 --out benchmarks/results/choices.jsonl

SmolLM2-135M and its variants (`variants.py`). A `[[group]]` names a variant, formats, the seeds of calibration draws,
the passes that all its `pipelines` begin with (`first`, which run once a seed), and the rest of each by name, with W
and A for the formats. Each draw takes other windows of the
calibration text. Every pipeline is scored on both halves of the test text, window by window: options are chosen on the
first half and reported on the second. A process takes the next group and seed that no other one has taken; records are
written at once, so that a run that is cut loses nothing and a later one continues with what is missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from accuracy import LOWER, VARIANTS
from permute import RandomOrder
from torch import Tensor

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.diagnostics.evaluation import score_windows
from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.graph.program import Program
from mxcompile.passes import PASSES
from mxcompile.pipeline.pipeline import Pipeline

LENGTH: Final = 512
TEST_LENGTH: Final = 2048


@dataclass(frozen=True)
class Group:
    """One group of the file with one seed."""

    number: int
    seed: int
    variant: str
    weight: str
    activation: str | None
    windows: int
    first: str
    pipelines: dict[str, str]

    def filled(self, text: str, lower: bool) -> Pipeline:
        activation = "none" if self.activation is None else self.activation
        whole = text + (LOWER if lower and "lower-mx" not in text else "")
        whole = whole.replace("=W", f"={self.weight}").replace("=A", f"={activation}")
        return Pipeline.parse(" ".join(whole.split()), passes=[RandomOrder, *PASSES.values()])

    @property
    def name(self) -> str:
        return f"{self.number}-{self.seed}"

    def described(self) -> dict[str, Any]:
        variant = f"SmolLM2-135M-Instruct {self.variant}".strip()
        return {"model": variant, "weight": self.weight, "activation": self.activation, "first": self.first}


def read_groups(file: Path) -> list[Group]:
    """The groups of a file, those with a lower `order` first, one for every seed."""
    found: list[tuple[float, Group]] = []
    for number, entry in enumerate(tomllib.loads(file.read_text())["group"]):
        weight, _, activation = entry["formats"].partition("/")
        for place, seed in enumerate(entry.get("seeds", [0])):
            group = Group(
                number, seed, entry.get("variant", ""), weight, activation or None, entry.get("windows", 64),
                " ".join(entry.get("first", "").split()), entry["pipelines"],
            )  # fmt: skip
            found.append((entry.get("order", 0) + place, group))
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


class Measurements:
    """Texts, and one variant of the model at a time, on one device."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = smollm2.load_tokenizer()
        self._programs: dict[str, tuple[Any, Program]] = {}

    @cached_property
    def calibration(self) -> list[Tensor]:
        ids = token_ids(self.tokenizer, read_text(self.arguments.calibration_text))
        return list(token_windows(ids.to(self.arguments.device), LENGTH, tokenizer=self.tokenizer))

    @cached_property
    def halves(self) -> dict[str, list[Tensor]]:
        ids = token_ids(self.tokenizer, read_text(self.arguments.test_text)).to(self.arguments.device).chunk(2)
        counts = map(int, self.arguments.test_windows.split(","))
        return {
            half: list(islice(token_windows(part, TEST_LENGTH, tokenizer=self.tokenizer), count))
            for half, part, count in zip(("first", "second"), ids, counts, strict=True)
        }

    def batches(self, windows: int, seed: int) -> list[dict[str, Tensor]]:
        """Batches of four windows: the first ones of the text for seed 0, others drawn from all of it."""
        drawn = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [self.calibration[index] for index in (range(windows) if seed == 0 else drawn[:windows])]
        return [{"input_ids": torch.cat(chosen[i : i + 4])} for i in range(0, len(chosen), 4)]

    def program(self, variant: str) -> tuple[Any, Program]:
        """(model, its traced program)."""
        if variant not in self._programs:
            model = VARIANTS[variant](smollm2.load()[0]).to(self.arguments.device)
            program = mxcompile.trace(model, {"input_ids": self.calibration[0][:1, :64]})
            self._programs = {variant: (model, program)}
        return self._programs[variant]

    def scores(self, model: Any, reference: Any) -> dict[str, Any]:
        """By half: means over tokens, and each window's `[nll, KL, top-1 agreement, nll of the float model]`."""
        result: dict[str, Any] = {}
        for half, windows in self.halves.items():
            scored = score_windows(model, windows, reference)
            by_window = [[round(total / window.tokens, 5) for total in window.sums] for window in scored]
            nll, kl, top1, exact = (round(sum(column) / len(column), 5) for column in zip(*by_window, strict=True))
            result[half] = {"nll": nll, "kl": kl, "top1": top1, "float_nll": exact, "windows": by_window}
        return result


def run_group(measurements: Measurements, group: Group, done: set[tuple[str, str]], out: Path, deadline: float) -> None:
    """Measure every pipeline of a group that has no record yet."""
    left = {name: text for name, text in group.pipelines.items() if (group.name, name) not in done}
    if not left:
        return
    model, program = measurements.program(group.variant)
    batches = measurements.batches(group.windows, group.seed)
    began = time.perf_counter()
    folded = group.filled(group.first, lower=False).run(program, batches) if group.first else program
    first_seconds = time.perf_counter() - began
    for name, text in left.items():
        if time.time() > deadline:
            return
        began = time.perf_counter()
        lowered = group.filled(text, lower=True).run(folded, batches)
        seconds = time.perf_counter() - began
        quantized = mxcompile.deploy(lowered, model, check=False)
        row: dict[str, Any] = {"key": [group.name, name], "pipeline": name, "text": " ".join(text.split())}
        row |= group.described() | {"seed": group.seed, "calibration": f"{group.windows}x{LENGTH}"}
        row |= {"bits": round(stored_bits(program, lowered, group), 4)}
        row |= {"first_seconds": round(first_seconds, 1), "seconds": round(seconds, 1)}
        row["halves"] = measurements.scores(quantized, model)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(group.name, name, f"{row['bits']:g} bits, {seconds:.0f} s", flush=True)


def stored_bits(program: Program, lowered: Program, group: Group) -> float:
    """Bits of the quantized weights a number, scales included."""
    default = parse_format(group.weight)
    shapes = {matmul.parameter: program.stored(matmul.parameter).shape for matmul in choose(program).matmuls}
    formats = {name: lowered.formats.get(name, default) or default for name in shapes}
    total = sum(formats[name].storage_bytes(shape[:-1].numel(), shape[-1]) for name, shape in shapes.items())
    return 8 * total / sum(shape.numel() for shape in shapes.values())


def read_records(out: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that a cut run has left half is left out."""
    records: list[dict[str, Any]] = []
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def work(arguments: argparse.Namespace) -> None:
    """Take one group after the other that no other process has taken."""
    deadline = arguments.until or time.time() + arguments.seconds
    measurements = Measurements(arguments)
    done = {(record["key"][0], record["key"][1]) for record in read_records(arguments.out)}
    for group in read_groups(arguments.file):
        if arguments.only and str(group.number) not in arguments.only.split(","):
            continue
        if time.time() > deadline or not _take(arguments.claims, group):
            continue
        try:
            run_group(measurements, group, done, arguments.out, deadline)
        except (MXCompileError, RuntimeError) as error:  # of torch: the other groups still run
            print(f"{group.name} failed: {type(error).__name__}: {str(error)[:500]}", flush=True)


def _take(claims: Path | None, group: Group) -> bool:
    """Whether this process is the first that asks for a group."""
    if claims is None:
        return True
    try:
        (claims / group.name).open("x").close()
    except FileExistsError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--test-text", type=Path, required=True)
    parser.add_argument("--test-windows", default="8,8", help="of the first and the second half")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6, help="begin no pipeline later than this")
    parser.add_argument("--only", help="numbers of groups, comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes == 1:
        work(arguments)
        return 0
    with tempfile.TemporaryDirectory() as claims:
        more = ["--processes", "1", "--claims", claims, "--until", str(time.time() + arguments.seconds)]
        workers = [subprocess.Popen([sys.executable, *sys.argv, *more]) for _ in range(arguments.processes)]
        return max(worker.wait() for worker in workers)


if __name__ == "__main__":
    sys.exit(main())
