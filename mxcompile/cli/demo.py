"""`mxcompile demo`: a real language model, quantized, compiled and compared with its float self.

Everything goes through the public API, as a user's own script would.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mxcompile.api import quantize_and_compile
from mxcompile.cli import smollm2
from mxcompile.cli.model_source import load_model
from mxcompile.cli.progress import Progress, track, waiting
from mxcompile.cli.texts import help_text
from mxcompile.diagnostics.evaluation import Evaluation, evaluate, token_windows
from mxcompile.diagnostics.tables import table
from mxcompile.inductor import compile_module
from mxcompile.tensor.modules import stored_bytes

_PROBE = 256
RECIPES = ("w8a8-mxint", "w4a8-mxint-quick")
_CAPTION = """\
KL: divergence from float, nats a token; top-1: share of tokens predicted alike
tokens/s: greedy, batch 1, static cache; float runs eagerly, the others compiled
"""
PROMPT = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"


@dataclass(frozen=True)
class Row:
    """What the demo finds out about one model."""

    name: str
    bytes: int
    evaluation: Evaluation
    tokens_per_second: float
    text: str


def run_demo(
    console: Console,
    source: str | None = None,
    *,
    folder: Path = Path("out/demo"),
    recipes: Sequence[str] = RECIPES,
    length: int = 2048,
    windows: int = 4,
    new_tokens: int = 32,
    compile: bool = True,
) -> list[Row]:
    """Quantize SmolLM2-135M (or the model at `source`, a local path or hub id) and print how it compares.

    length, windows: the evaluation text, `windows` windows of `length` tokens of Python's own help topics.
    new_tokens: generated greedily from a fixed prompt. The graph dumps go to `folder`, one folder a recipe.
    """
    console.print(f"loading {source or smollm2.NAME}")
    with waiting(console, "loading"):
        model, tokenizer = load_model(source)
    ids: Tensor = tokenizer(help_text(), return_tensors="pt").input_ids[0]
    text = list(token_windows(ids, length, windows))
    prompt: Tensor = tokenizer(PROMPT, return_tensors="pt").input_ids
    console.print(f"evaluating on {len(text)} windows of {length} tokens of Python's help topics")
    rows = [_measure(console, "float", model, None, text, (prompt, tokenizer, new_tokens))]
    for recipe in recipes:
        console.print(f"[bold]{recipe}[/bold]")
        with Progress(console) as progress:
            quantized = quantize_and_compile(
                model,
                {"input_ids": text[0]},
                recipe=recipe,
                dump=folder / recipe,
                probe={"input_ids": text[0][:, :_PROBE]},
                compile=False,
                instruments=[progress],
            )
        rows.append(_measure(console, recipe, quantized, model, text, (prompt, tokenizer, new_tokens), compile))
    _report(console, rows, folder, length)
    return rows


def _measure(
    console: Console,
    name: str,
    model: nn.Module,
    reference: nn.Module | None,
    text: list[Tensor],
    generation: tuple[Tensor, Any, int],
    compile: bool = False,
) -> Row:
    size = stored_bytes(model)
    evaluation = evaluate(model, track(console, text, f"evaluating {name}"), reference)
    console.print(f"  perplexity {evaluation.perplexity:.3f}")
    prompt, tokenizer, new_tokens = generation
    if compile:
        with waiting(console, "compiling (once for the prompt, once for the decode step; cached on disk)"):
            compile_module(model)
            _generate(model, prompt, new_tokens)
    seconds, tokens = _generate(model, prompt, new_tokens)
    return Row(name, size, evaluation, new_tokens / seconds, tokenizer.decode(tokens, skip_special_tokens=True))


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, Tensor]:
    """Seconds and ids of the tokens generated greedily with a static cache."""
    began = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
    )
    return time.perf_counter() - began, output[0, prompt.shape[1] :]


def _report(console: Console, rows: list[Row], folder: Path, length: int) -> None:
    title = f"{rows[0].evaluation.tokens} tokens of Python's help topics, length {length}"
    before = rows[0]
    cells = [
        (
            row.name,
            f"{row.bytes / 1e6:.1f}",
            f"{row.bytes / before.bytes:.0%}",
            f"{row.evaluation.perplexity:.3f}",
            f"{row.evaluation.perplexity / before.evaluation.perplexity - 1:+.2%}",
            "" if row.evaluation.kl is None else f"{row.evaluation.kl:.4f}",
            "" if row.evaluation.top1 is None else f"{row.evaluation.top1:.1%}",
            f"{row.tokens_per_second:.1f}",
        )
        for row in rows
    ]
    numbers = ("MB", "size", "perplexity", "change", "KL", "top-1", "tokens/s")
    console.print(table(("model",), numbers, cells, title))
    console.print(_CAPTION)
    for row in rows:
        console.print(f"[bold]{row.name}[/bold]: {PROMPT}[green]{row.text.rstrip()}[/green]", highlight=False)
    last = folder / rows[-1].name
    console.print(f"what every pass did: {last / 'index.html'} (or mxcompile show {last})")
