"""What the output head in 8 bits costs: perplexity and KL of SmolLM2-135M with its head in float and quantized.

    python benchmarks/head.py --out benchmarks/results/head.jsonl
    python benchmarks/head.py --text validation.txt --calibration train-1000.jsonl --recipes w4a8-mxint,w8a8-mxint

Text: Python's help topics, second half, or `--text`. `nll` is the mean negative log-likelihood a token in nats, `kl`
and `top1` compare with the float model. The file of SmolLM2 holds its head in 8 bits; `--variant off-grid` takes all
weights off the levels of the file, the head's by random factors in the norm before it. Recipes that learn take 128
windows of 512 tokens of the first half of the help topics, or of `--calibration`.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from variants import take_off_grid

import mxcompile
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import HELP_TOPICS, help_text, read_text
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.passes.recipes import as_pipeline

HEADS: Final = ("none", "mxint8", "mxfp8_e4m3", "mxint6", "mxint4")
RECIPES: Final = "w4a8-mxint-quick,w4a8-mxfp-quick,w8a8-mxint-quick,w4a16-mxint-quick"


def main() -> None:
    arguments = parser().parse_args()
    loaded, tokenizer = smollm2.load()
    model = (head_off_grid(take_off_grid(loaded)) if arguments.variant else loaded).to(arguments.device)
    halves = list(token_ids(tokenizer, help_text()).chunk(2))
    for half, path in enumerate((arguments.calibration, arguments.text)):
        halves[half] = token_ids(tokenizer, read_text(path)) if path else halves[half]
    text = arguments.text.name if arguments.text else HELP_TOPICS
    learned, test = (
        [window.to(arguments.device) for window in islice(token_windows(ids, length, tokenizer=tokenizer), count)]
        for ids, length, count in zip(halves, (512, 1024), (128, arguments.windows), strict=True)
    )
    batches = [{"input_ids": part} for part in torch.cat(learned).split(16)]
    for recipe in arguments.recipes.split(","):
        for head in arguments.heads.split(","):
            row = measured(model, test, batches, recipe, head) | {"variant": arguments.variant, "text": text}
            write(row | {"device": arguments.device}, arguments.out)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", default=RECIPES, help="comma-separated")
    parser.add_argument("--heads", default=",".join(HEADS[:3]), help="comma-separated formats, or none for float")
    parser.add_argument("--windows", type=int, default=8, help="test windows of 1024 tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path, help="test on this file, .txt or .jsonl, in place of the help topics")
    parser.add_argument("--calibration", type=Path, help="calibrate on this file in place of the help topics")
    parser.add_argument("--variant", default="", choices=("", "off-grid"))
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def head_off_grid(model: Any) -> Any:
    """Multiply the channels of the last norm by random factors, and divide the head, which is no longer tied."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm = model.model.norm
        factors = torch.exp2(2 * torch.rand(norm.weight.numel(), generator=generator) - 1)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight / factors)
        norm.weight *= factors
    return model


def measured(
    model: Any, test: list[Tensor], batches: list[dict[str, Tensor]], recipe: str, head: str
) -> dict[str, Any]:
    options: Any = {} if head == "none" else {"include": ["lm_head"], "overrides": {"lm_head": head}}
    example = {"input_ids": test[0][:, :16]}
    if as_pipeline(recipe).reads_calibration:
        options["calibration"] = batches
    quantized = mxcompile.quantize_and_compile(model, example, recipe=recipe, compile=False, **options)
    scores = evaluate(quantized, test, model)
    row = {"model": smollm2.NAME, "recipe": recipe, "head": head, "nll": round(scores.nll, 4)}
    row |= {"perplexity": round(scores.perplexity, 3), "kl": round(scores.kl or 0.0, 5)}
    return row | {"top1": round(scores.top1 or 0.0, 4), "tokens": scores.tokens}


def write(row: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
