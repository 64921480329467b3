"""What people quantize, end to end: traced, in 8 bits, in learned 4 bits, saved and loaded, and generating.

    python benchmarks/zoo.py [NAME ...] [--again]

Tiny models with random weights (`zoo_models.py`). Each runs in a process of its own with a time limit, and gets a line
in `results/zoo.jsonl` (`--again`: also those that have one). `quantized`: share of matmul weight bytes in an MX format,
without the output head and routers. `w8a8_db`: SQNR of the output of the module that `w8a8-mxint-quick` deploys, on
inputs of another batch size and length than traced, where the graph allows it; `w4a8_db` is that of the default recipe
with four tiny calibration batches, `w4a8_quick_db` that of rounding alone. `saved`: the outputs of the saved and loaded
module are equal bit for bit. `generated`: `w8a16-mxint` generates the tokens of the same weights in float; `as_float`:
share of generated tokens in which w8a8 agrees with the float model. Null: not tried. `reasons`: why a stage failed, or
left a matmul in float. `seconds`: CPU seconds of the trace, on one thread.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from zoo_models import ZOO, build, inputs, prompt

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.deploy import deploy
from mxcompile.errors import InputError, MXCompileError
from mxcompile.graph.agreement import output_tensors
from mxcompile.graph.program import Program
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.passes.recipes import as_pipeline
from mxcompile.tensor.modules import is_pretrained, named_tensors, set_tensors
from mxcompile.tensor.weight import MXWeight

RESULTS: Final = Path(__file__).parent / "results" / "zoo.jsonl"
LIMIT_SECONDS: Final = 900.0
NEW_TOKENS: Final = 8


@dataclass
class Specimen:
    """An architecture on its way through the stages."""

    name: str
    model: nn.Module
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    program: Program | None = None
    deployed: nn.Module | None = None

    @property
    def traced(self) -> Program:
        assert self.program is not None
        return self.program

    def quantized(self, recipe: str, calibration: Iterable[dict[str, Tensor]] | None = None) -> nn.Module:
        batches = None if calibration is None else list(calibration)
        return deploy(as_pipeline(recipe).run(self.traced, batches), self.model)

    def other_inputs(self) -> dict[str, Tensor]:
        """Of another size than traced; of the same size where the graph or the model has one only."""
        other = inputs(self.name, batch=3, length=12, seed=1)
        try:
            self.traced(**other)
        except (InputError, RuntimeError):
            return inputs(self.name, seed=1)
        return other

    def sqnr_db(self, quantized: nn.Module) -> float:
        probe = self.other_inputs()
        return round(sqnr_db(main_output(self.model, probe), main_output(quantized, probe)), 1)


def main_output(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """The first float tensor of a model's output: logits, mostly."""
    with torch.no_grad():
        return next(iter(output_tensors(model(**arguments)).values()))


def trace(specimen: Specimen) -> dict[str, Any]:
    start = time.process_time()
    specimen.program = mxcompile.trace(specimen.model, inputs(specimen.name), allow_partial=True)
    return {"traced": True, "seconds": round(time.process_time() - start, 1)}


def eight_bits(specimen: Specimen) -> dict[str, Any]:
    choice = choose(specimen.traced)
    weights = {matmul.parameter: specimen.traced.tensor(matmul.parameter).nbytes for matmul in choice.matmuls}
    covered, missed = sum(weights.values()), sum(miss.bytes for miss in choice.unsupported)
    specimen.record["quantized"] = round(covered / (covered + missed), 4) if covered + missed else 0.0
    by_size = sorted((miss for miss in choice.unsupported if miss.bytes), key=lambda miss: -miss.bytes)
    specimen.record["misses"] = list(dict.fromkeys(miss.reason for miss in by_size))[:3]
    specimen.deployed = specimen.quantized("w8a8-mxint-quick")
    return {"w8a8_db": specimen.sqnr_db(specimen.deployed)}


def learned(specimen: Specimen) -> dict[str, Any]:
    specimen.record["w4a8_quick_db"] = specimen.sqnr_db(specimen.quantized("w4a8-mxint-quick"))
    try:
        quantized = specimen.quantized("w4a8-mxint", _batches(specimen.name, batch=4, length=16))
    except InputError:  # traced for one size
        quantized = specimen.quantized("w4a8-mxint", _batches(specimen.name))
    return {"w4a8_db": specimen.sqnr_db(quantized)}


def _batches(name: str, **sizes: int) -> list[dict[str, Tensor]]:
    return [inputs(name, seed=10 + number, **sizes) for number in range(4)]


def saved(specimen: Specimen) -> dict[str, Any]:
    deployed = specimen.deployed
    assert deployed is not None
    probe = inputs(specimen.name)
    with tempfile.TemporaryDirectory() as folder:
        mxcompile.save(deployed, f"{folder}/model")
        skeleton = None if is_pretrained(deployed) else build(specimen.name)
        loaded = mxcompile.load(f"{folder}/model", model=skeleton)
        return {"saved": torch.equal(main_output(loaded, probe), main_output(deployed, probe))}


def generated(specimen: Specimen) -> dict[str, Any]:
    if not can_generate(specimen.model):
        return {}
    assert specimen.deployed is not None
    weights_only = specimen.quantized("w8a16-mxint")
    same = torch.equal(
        _tokens(weights_only, specimen.name), _tokens(_dequantized(weights_only, specimen), specimen.name)
    )
    plain, quantized = _tokens(specimen.model, specimen.name), _tokens(specimen.deployed, specimen.name)
    return {"generated": same, "as_float": round((plain == quantized).float().mean().item(), 3)}


def can_generate(model: Any) -> bool:
    return hasattr(model, "generate") and getattr(model, "can_generate", lambda: True)()


def _dequantized(quantized: nn.Module, specimen: Specimen) -> nn.Module:
    """The float model with the weights of a quantized one."""
    model = build(specimen.name)
    weights = {name: value for name, value in named_tensors(quantized).items() if isinstance(value, MXWeight)}
    set_tensors(model, [(name, value.dequantize()) for name, value in weights.items()])
    return model


def _tokens(model: Any, name: str) -> Tensor:
    """The tokens that greedy decoding adds to a prompt, `[batch, NEW_TOKENS]`."""
    sizes = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        return model.generate(**prompt(name), **sizes, do_sample=False, use_cache=True)[:, -NEW_TOKENS:]


STAGES: Final[tuple[Callable[[Specimen], dict[str, Any]], ...]] = (trace, eight_bits, learned, saved, generated)
_COLUMNS: Final = (
    *("architecture", "kind", "traced", "seconds", "quantized", "misses", "w8a8_db", "w4a8_quick_db", "w4a8_db"),
    *("saved", "generated", "as_float", "reasons"),
)


def measure(name: str, report: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
    """The record of one architecture; `report` gets what is known of it before each stage."""
    specimen = Specimen(name, build(name))
    record = specimen.record
    record |= {**dict.fromkeys(_COLUMNS), "architecture": name, "kind": ZOO[name].kind, "reasons": {}}
    for stage in STAGES:
        report(record)
        try:
            record |= stage(specimen)
        except Exception as error:
            record["reasons"][stage.__name__] = first_sentence(error)
            if stage in (trace, eight_bits):
                break
    record["traced"] = bool(record["traced"])
    return record


def first_sentence(error: Exception) -> str:
    """What an error of mxcompile says first; an error of another kind is a fault, and its type is named too."""
    line = (str(error).strip().splitlines() or [""])[0]
    sentence = line.partition(". ")[0][:300]
    return sentence if isinstance(error, MXCompileError) else f"{type(error).__name__}: {sentence}"


def _run(name: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    sender.send(("done", measure(name, lambda record: sender.send(("partial", dict(record))))))


def run(name: str) -> dict[str, Any]:
    """The record of one architecture, measured in a process of its own, or what was known when the time was over."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, sender))
    process.start()
    sender.close()
    record: dict[str, Any] = {**dict.fromkeys(_COLUMNS), "architecture": name, "kind": ZOO[name].kind, "reasons": {}}
    state, end = "partial", time.monotonic() + LIMIT_SECONDS
    try:
        while state != "done" and receiver.poll(max(0.0, end - time.monotonic())):
            state, record = receiver.recv()
    except EOFError:
        state = "died"
    if state != "done":
        process.kill()
        reason = "the process died" if state == "died" else f"not done after {LIMIT_SECONDS:.0f} s"
        record = {**record, "traced": bool(record["traced"]), "reasons": {**record["reasons"], "process": reason}}
    process.join()
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--again", action="store_true", help="measure those that have a line, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mxcompile.trace(nn.Linear(32, 32), torch.randn(2, 32))  # import what tracing needs before the processes fork
    for name in arguments.names or ZOO:
        if arguments.again or name not in _records():
            record = run(name)
            print(json.dumps(record), flush=True)
            records = {**_records(), name: record}
            RESULTS.write_text("".join(json.dumps(records[name]) + "\n" for name in ZOO if name in records))
    return 0


def _records() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {record["architecture"]: record for record in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
