"""What each algorithm saves of what rounding costs: mean negative log-likelihood on text that calibration has not seen.

    python benchmarks/accuracy.py --formats mxint4:mxint8 --out benchmarks/results/accuracy.jsonl

SmolLM2-135M. Text: Python's help topics, calibration from their first half, test windows from their second; or files.
`closes` is the share of the gap between the first algorithm (plain rounding) and float that is closed. Nothing is drawn
at random but the tokens sampled by a search and the planted channels (`--planted`), both with seed 0.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from planted import plant
from torch import Tensor

import mxcompile
from mxcompile import smollm2
from mxcompile.demo import help_text
from mxcompile.evaluation import evaluate, token_windows
from mxcompile.pipeline import Pipeline

ALGORITHMS: Final = {
    "rtn": "round-weights{format=W}",
    "rtn weighted": "round-weights{format=W,weighted=true}",
    "smooth-quant": "smooth-quant | round-weights{format=W}",
    "smooth-quant searched": "smooth-quant{alpha=none,weight=W,activation=A} | round-weights{format=W}",
    "awq-fold": "awq-fold{weight=W,activation=A} | round-weights{format=W}",
}
LOWER: Final = " | lower-mx{weight=W,activation=A}"
HALVES: Final = {"first": slice(None, 1), "second": slice(1, None), "all": slice(None)}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    model, tokenizer = smollm2.load()
    model = (plant(model) if arguments.planted else model).to(arguments.device)
    batches, test = texts(arguments, tokenizer)
    exact = evaluate(model, test).nll
    program = mxcompile.trace(model, {"input_ids": batches[0]["input_ids"][:1, :64]})
    for pair in arguments.formats.split(","):
        weight, activation = pair.split("/") if "/" in pair else pair.split(":")
        first: float | None = None
        for name in arguments.algorithms.split(","):
            text = (ALGORITHMS.get(name, name) + LOWER).replace("=W", f"={weight}").replace("=A", f"={activation}")
            began = time.perf_counter()
            lowered = Pipeline.parse(text.replace(";", ",")).run(program, batches)
            seconds = time.perf_counter() - began
            nll = evaluate(mxcompile.deploy(lowered, model, check=False), test).nll
            first = nll if first is None else first
            row: dict[str, Any] = {"weight": weight, "activation": activation, "algorithm": name}
            row |= {"planted": True} if arguments.planted else {}
            row |= {"nll_float": round(exact, 4), "nll": round(nll, 4)}
            row |= {"closes": round((first - nll) / (first - exact), 3), "seconds": round(seconds, 1)}
            row |= described(arguments, batches, test)
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(
        "--formats",
        default="mxint4:mxint8",
        help="weight:activation (weight/activation, to give block sizes), comma-separated",
    )
    parser.add_argument(
        "--algorithms", default="rtn,rtn weighted,smooth-quant,awq-fold",
        help="comma-separated names, or passes before lower-mx with W, A for the formats and ; between options",
    )  # fmt: skip
    parser.add_argument("--planted", action="store_true", help="plant outlier channels first")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--calibration-text", type=Path, help="a .txt file, or .jsonl with a text a line")
    parser.add_argument("--test-text", type=Path, help="likewise; help topics if left out")
    parser.add_argument("--test-half", choices=HALVES, default="second", help="part of the test text")
    parser.add_argument("--windows", type=int, default=16, help="test windows")
    parser.add_argument("--length", type=int, default=2048, help="tokens a test window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="add the results here, one JSON object a line")
    return parser


def texts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """(calibration batches of four windows, test windows)."""
    own = arguments.test_text is None
    test_ids = tokens(tokenizer, help_text() if own else read(arguments.test_text))
    halves = test_ids.chunk(2)
    if own and (arguments.test_half != "second" or arguments.calibration_text):
        sys.exit("help topics serve for both calibration and test only as first and second half: name both files")
    calibration = halves[0] if own else tokens(tokenizer, read(arguments.calibration_text))
    part = torch.cat(halves[HALVES[arguments.test_half]]).to(arguments.device)
    windows = list(token_windows(calibration.to(arguments.device), 512, arguments.calibration))
    batches = [{"input_ids": torch.cat(windows[i : i + 4])} for i in range(0, len(windows), 4)]
    return batches, list(islice(token_windows(part, arguments.length), arguments.windows))


def read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return "\n\n".join(json.loads(line)["text"] for line in text.splitlines()) if path.suffix == ".jsonl" else text


def tokens(tokenizer: Any, text: str) -> Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def described(arguments: argparse.Namespace, batches: list[dict[str, Tensor]], test: list[Tensor]) -> dict[str, Any]:
    windows = sum(len(batch["input_ids"]) for batch in batches)
    names = [arguments.test_text, arguments.calibration_text]
    test_name, calibration_name = (path.name if path else "help topics" for path in names)
    return {
        "test": f"{test_name}, {arguments.test_half} half, {len(test)}x{test[0].shape[1]}",
        "calibration": f"{calibration_name}, {windows}x512",
        "device": arguments.device,
    }


if __name__ == "__main__":
    main()
