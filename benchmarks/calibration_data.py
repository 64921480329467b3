"""Whether the calibration data matter: the model's own text, a text of the same kind, windows of several lengths.

    python benchmarks/calibration_data.py --calibration c4.jsonl --text wikitext2-validation.txt --out FILE

SmolLM2-135M, one recipe, the same number of calibration tokens in every row. KL from the float model on texts that no
row calibrates on: the second half of `--text` in short and in long windows, and the second half of Python's help topics
(the first is the default of the commands). Of a file, the seed says which part is taken; the model's own text is
sampled with it. `lengths` in brackets have no weights: there every token counts alike, else every window.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import mxcompile
from mxcompile.calibration.data.batches import windows_in_words
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text, read_text
from mxcompile.passes.recipes import as_pipeline

WINDOW: Final = 512
MIXED: Final = (128, 512, 2048)
Batches = list[mxcompile.WeightedBatch]


def main() -> None:
    arguments = parser().parse_args()
    model, tokenizer = smollm2.load()
    model.to(arguments.device)
    texts = _test_texts(arguments, tokenizer)
    program = mxcompile.trace(model, {"input_ids": texts[0][1][0][:, :64].to(arguments.device)})
    for seed in map(int, arguments.seeds.split(",")):
        makers = _calibrations(arguments, model, tokenizer, seed)
        for name in arguments.only.split(";") if arguments.only else makers:
            began = time.perf_counter()
            batches = [batch.to(arguments.device) for batch in makers[name]()]
            made = time.perf_counter()
            lowered = as_pipeline(arguments.recipe).run(program, batches)
            done = time.perf_counter()
            deployed = mxcompile.deploy(lowered, model, check=False)
            row: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "recipe": arguments.recipe, "calibration": name}
            row |= {"windows": windows_in_words(batches), "seed": seed, "device": arguments.device}
            row |= {"calibration_tokens": sum(batch["input_ids"].numel() for batch in batches)}
            row |= {"making_seconds": round(made - began, 1), "seconds": round(done - made, 1), "texts": []}
            for text, windows in texts:
                scores = mxcompile.evaluate(deployed, windows, model)
                kl, nll, float_nll = (round(x or 0.0, 5) for x in (scores.kl, scores.nll, scores.reference_nll))
                described = {"text": text, "length": windows[0].shape[1], "tokens": scores.tokens}
                row["texts"].append(described | {"kl": kl, "nll": nll, "float_nll": float_nll})
            _write(row, arguments.out)


def _calibrations(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, seed: int
) -> dict[str, Callable[[], Batches]]:
    """Each row's calibration batches; all of `tokens` tokens, or some hundred more or less."""
    tokens = arguments.windows * WINDOW
    file = _part(token_ids(tokenizer, read_text(arguments.calibration)), seed, tokens + 4096)
    own_kind = _part(token_ids(tokenizer, help_text()).chunk(2)[0], seed, tokens + 4096)

    def cut(ids: Tensor, length: int | tuple[int, ...] = WINDOW) -> Batches:
        lengths = (length,) if isinstance(length, int) else length
        count = sum(tokens / len(lengths) / each for each in lengths)
        return mxcompile.calibration_batches(ids, tokenizer, length=lengths, windows=round(count))

    return {
        "file": lambda: cut(file),
        "help topics": lambda: cut(own_kind),
        "own text": lambda: mxcompile.generate_calibration(model, tokenizer, arguments.windows, WINDOW, seed),
        "file, mixed": lambda: cut(file, MIXED),
        "file, [mixed]": lambda: [mxcompile.WeightedBatch(batch) for batch in cut(file, MIXED)],
        "file, 128": lambda: cut(file, 128),
        "file, 2048": lambda: cut(file, 2048),
    }


def _part(ids: Tensor, seed: int, tokens: int) -> Tensor:
    """Token ids of another part of a text for every seed."""
    return ids[seed * tokens : (seed + 1) * tokens]


def _test_texts(arguments: argparse.Namespace, tokenizer: Any) -> list[tuple[str, list[Tensor]]]:
    """A description of each text and its windows, all of `test_tokens` tokens."""
    held_out = token_ids(tokenizer, read_text(arguments.text)).chunk(2)[1]
    topics = token_ids(tokenizer, help_text()).chunk(2)[1]
    named = ((f"{arguments.text.name}, second half", held_out), ("help topics, second half", topics))
    lengths = ((128, 2048), (512,))
    return [
        (name, list(token_windows(ids, length, arguments.test_tokens // length)))
        for (name, ids), each in zip(named, lengths, strict=True)
        for length in each
    ]


def _write(row: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True, help="a .txt or .jsonl file")
    parser.add_argument("--text", type=Path, required=True, help="a .txt or .jsonl file to evaluate on")
    parser.add_argument("--recipe", default="w4a8-mxint", help="a recipe or pipeline")
    parser.add_argument("--windows", type=int, default=16, help="calibration tokens, in windows of 512")
    parser.add_argument("--test-tokens", type=int, default=8192, help="tokens of each text to evaluate on")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--only", default="", help="some of the rows, separated by semicolons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


if __name__ == "__main__":
    with torch.no_grad():
        main()
