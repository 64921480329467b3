"""Does `diagnose` name the layers that were made hard to quantize, and do its recommended steps help them?

    python benchmarks/diagnosis.py --variant planted --out benchmarks/results/diagnosis.jsonl

SmolLM2-135M on Python's help topics, diagnosed on windows of their first half. A recommended step is then taken by the
pass itself (`awq-fold`, `permute`, `rotate`, 8-bit formats) for the whole model, and the SQNR of each layer's output
on its input in the float model is compared with rounding to nearest, on a window of the second half. A step improves
a layer if that SQNR is higher.
"""

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from variants import plant, plant_hidden, take_off_grid

from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.diagnostics.diagnosis import Diagnosis
from mxcompile.diagnostics.measure import Measure
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.pipeline.pipeline import Pipeline

VARIANTS: Final[dict[str, Callable[[nn.Module], nn.Module]]] = {
    "": lambda model: model,
    "planted": plant,
    "planted-hidden": plant_hidden,
    "off-grid": take_off_grid,
}
ROUND: Final = "round-weights{{format={weight}}} | lower-mx{{weight={weight},activation={activation}}}"
STEPS: Final = {
    "fold": "awq-fold{{weight={weight},activation={activation},through_linears=true}} | " + ROUND,
    "permute": "permute | " + ROUND,
    "rotate": "rotate{{weight={weight},activation={activation}}} | " + ROUND,
}
PLANTED: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="", help="change the weights first, not the function")
    parser.add_argument("--weight", default="mxint4")
    parser.add_argument("--activation", default="mxint8")
    parser.add_argument("--windows", type=int, default=4, help="to diagnose and calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the record to this file")
    arguments = parser.parse_args()
    model, tokenizer = smollm2.load()
    model = VARIANTS[arguments.variant](model).to(arguments.device)
    first, second = token_ids(tokenizer, help_text()).to(arguments.device).chunk(2)
    windows = islice(token_windows(first, arguments.length, tokenizer=tokenizer), arguments.windows)
    batches = [{"input_ids": torch.cat(list(windows))}]
    probe = {"input_ids": next(iter(token_windows(second, arguments.length, tokenizer=tokenizer)))}
    program = trace(model, {"input_ids": probe["input_ids"][:, :64]})
    formats = {"weight": arguments.weight, "activation": arguments.activation}
    diagnosed = Pipeline.parse("diagnose{{weight={weight},activation={activation}}}".format(**formats))
    diagnosis = Diagnosis.of(diagnosed.run(program, batches).ledger)
    assert diagnosis is not None
    planted = {layer for value in diagnosis.values for layer in value.layers if layer.split(".")[-2] in PLANTED}
    planted = planted if arguments.variant == "planted" else set[str]()
    steps = {name: judged(diagnosis, name, program, batches, probe, formats) for name in (*STEPS, "bits")}
    imbalances = {
        kind: [value.numbers["imbalance"] for value in diagnosis.values if (value.layers[0] in planted) == kind]
        for kind in (True, False)
    }
    row: dict[str, Any] = {"model": f"{smollm2.NAME} {arguments.variant}".strip(), **formats}
    row |= {"layers": sum(len(value.layers) for value in diagnosis.values), "planted": len(planted)}
    row |= {"named": len(diagnosis.outliers), "named_planted": len(planted.intersection(diagnosis.outliers))}
    row |= {"least_planted_imbalance": round(min(imbalances[True]), 1) if planted else None}
    row |= {"largest_other_imbalance": round(max(imbalances[False]), 1)}
    row |= {f"{name}_{key}": number for name, counts in steps.items() for key, number in counts.items()}
    row |= {"text": "help topics", "tokens": arguments.windows * arguments.length}
    print(json.dumps(row), flush=True)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def judged(
    diagnosis: Diagnosis, step: str, program: Program, batches: list[Any], probe: Any, formats: dict[str, str]
) -> dict[str, int]:
    """How many layers a step was recommended for, and how many of them it improves."""
    advised = [
        layer for value in diagnosis.values if value.advice and value.advice.step == step for layer in value.layers
    ]
    if not advised:
        return {"advised": 0, "improved": 0}
    more = {"weight": "mxint8" if "int" in formats["weight"] else "mxfp8_e4m3", "activation": formats["activation"]}
    text = ROUND.format(**more) if step == "bits" else STEPS[step].format(**formats)
    before, after = (local_db(each, program, batches, probe) for each in (ROUND.format(**formats), text))
    return {"advised": len(advised), "improved": sum(after[layer] > before[layer] for layer in advised)}


def local_db(text: str, program: Program, batches: list[Any], probe: Any) -> dict[str, float]:
    """SQNR of each layer's output on its input in the float model, after a pipeline."""
    record = Pipeline.parse(text).run(program, batches, [Measure(probe)]).ledger[-1]
    assert record.measured is not None
    return {name: layer.local_db for name, layer in record.measured.layers.items() if layer.local_db is not None}


if __name__ == "__main__":
    main()
