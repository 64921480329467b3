"""What quantizing costs: seconds of every stage, and the peak memory of the process.

    python benchmarks/costs.py --recipe w8a8-mxint-quick --out benchmarks/results/costs.jsonl
    python benchmarks/costs.py --recipe "awq-fold{weight=mxint4,activation=mxint8} | ..." --calibration 128

SmolLM2-135M (or `--model`, a local path or hub id), traced with 64 tokens; nothing is compiled. Calibration: windows of
512 tokens of Python's help topics, in batches of four; `carried MB` is the size of one hidden state of all of them.
Memory is the process's resident set, Linux only. `peak over model bytes`: its peak over all stages, less its size
before the model was loaded (interpreter and libraries), over the bytes of the float model's parameters.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxcompile
from mxcompile.calibration.data.windows import token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.passes.recipes import as_pipeline
from mxcompile.tensor.modules import stored_bytes

_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes: `VmRSS` now, or `VmHWM`, the highest since the last reset."""
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def load(source: str | None) -> Any:
    if source is None:
        return smollm2.load()[0]
    return AutoModelForCausalLM.from_pretrained(source)


def timed(seconds: dict[str, float], name: str, call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = call()
    seconds[name] = time.perf_counter() - began
    return result


def calibration_data(source: str | None, windows: int) -> list[dict[str, Tensor]] | None:
    """Batches of four windows of 512 tokens, or None for no windows."""
    if not windows:
        return None
    tokenizer = smollm2.load_tokenizer() if source is None else AutoTokenizer.from_pretrained(source)
    ids = tokenizer(help_text(), return_tensors="pt").input_ids[0]
    chosen = list(token_windows(ids, 512, windows, tokenizer=tokenizer))
    return [{"input_ids": torch.cat(chosen[start : start + 4])} for start in range(0, len(chosen), 4)]


def measure(source: str | None, recipe: str, tokens: int, windows: int) -> dict[str, Any]:
    pipeline, calibration = as_pipeline(recipe), calibration_data(source, windows)
    libraries = resident("VmRSS")
    model = load(source)
    loaded = resident("VmRSS")
    ids = torch.arange(tokens).unsqueeze(0) % model.config.vocab_size
    _RESET_PEAK.write_text("5")
    seconds: dict[str, float] = {}
    program = timed(seconds, "trace", lambda: mxcompile.trace(model, {"input_ids": ids}))
    lowered = timed(seconds, "pipeline", lambda: pipeline.run(program, calibration))
    deployed = timed(seconds, "deploy", lambda: mxcompile.deploy(lowered, model))
    peak, own = resident("VmHWM"), stored_bytes(model)
    return {
        "recipe": recipe,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds of passes": {record.name: round(record.seconds, 2) for record in lowered.ledger},
        "total seconds": round(sum(seconds.values()), 2),
        "MB": {"libraries": libraries / 1e6, "model loaded": loaded / 1e6, "peak": peak / 1e6},
        "model MB": own / 1e6,
        "deployed MB": stored_bytes(deployed) / 1e6,
        "carried MB": windows * 512 * model.config.hidden_size * 4 / 1e6,
        "peak over model bytes": round((peak - libraries) / own, 3),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local path or hub id; default: SmolLM2-135M")
    parser.add_argument("--recipe", default="w4a8-mxint-quick", help="a recipe's name, or the text of a pipeline")
    parser.add_argument("--tokens", type=int, default=64, help="length of the example input")
    parser.add_argument("--calibration", type=int, default=0, help="windows of 512 tokens; 0: the example input")
    parser.add_argument("--out", type=Path, help="append the result to this file, one JSON object a line")
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.recipe, arguments.tokens, arguments.calibration)
    print(json.dumps(result, indent=2))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
