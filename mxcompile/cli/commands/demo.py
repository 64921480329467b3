"""`mxcompile demo`: a real language model, quantized, compiled and compared with the float model.

It runs the code of the commands `eval` and `generate`.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mxcompile.cli.compare import Comparison, EvalOptions, load_with_data, quantize, score_recipes
from mxcompile.cli.console import quoted
from mxcompile.cli.generation import Generation, generate_text
from mxcompile.cli.progress import waiting
from mxcompile.diagnostics.dump import Dump
from mxcompile.diagnostics.evaluation import Metric
from mxcompile.diagnostics.tables import table
from mxcompile.inductor import compile_module

_PROBE = 256
_FLOAT = "float"
RECIPES = ("w8a8-mxint-quick", "w4a8-mxint-quick")
PROMPT = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
_CAPTION = """\
KL: divergence from float in nats per token; top-1: tokens predicted alike
tokens/s: greedy, batch 1, static cache; float runs eagerly, the others compiled
"""


def run_demo(
    results: Console, messages: Console, options: EvalOptions, folder: Path, new_tokens: int, compile: bool
) -> None:
    """Quantize a model by each of `RECIPES` and print how it compares with the float model.

    options: the model and the windows of text to evaluate on. folder: gets a dump for each recipe. new_tokens: to
    generate greedily from a fixed prompt.
    """
    for recipe in RECIPES:
        Dump(folder / recipe)  # refuses a folder that it cannot write to
    model, tokenizer, data = load_with_data(messages, options)
    generations = {_FLOAT: _generate(messages, model, tokenizer, new_tokens, compile=False)}
    probe = {"input_ids": data.windows[0][:, :_PROBE]}
    quantized = {
        recipe: quantize(messages, model, data, recipe, dump=folder / recipe, probe=probe) for recipe in RECIPES
    }
    comparisons = score_recipes(messages, options, data, quantized, model)
    for recipe in RECIPES:
        generations[recipe] = _generate(messages, quantized[recipe], tokenizer, new_tokens, compile)
    _print_results(results, comparisons, generations)
    last = folder / RECIPES[-1]
    results.print(f"report of every pass: {last / 'index.html'} (or mxcompile show {quoted(last)})", markup=False)


def _generate(messages: Console, model: Any, tokenizer: Any, new_tokens: int, compile: bool) -> Generation:
    """Generate exactly `new_tokens`; a compiled model generates twice, so that compiling is not measured."""
    if compile:
        with waiting(messages, "compiling (once for the prompt, once for the decode step; cached on disk)"):
            compile_module(model)
            generate_text(model, tokenizer, PROMPT, new_tokens, min_new_tokens=new_tokens, static_cache=True)
    with waiting(messages, "generating"):
        return generate_text(model, tokenizer, PROMPT, new_tokens, min_new_tokens=new_tokens, static_cache=True)


def _print_results(console: Console, comparisons: dict[str, Comparison], generations: dict[str, Generation]) -> None:
    data, rows = comparisons[RECIPES[0]].data, [_float_row(comparisons[RECIPES[0]])]
    for name, comparison in comparisons.items():
        scores = comparison.scores
        rows.append(
            (
                name,
                f"{comparison.bytes / 1e6:.1f}",
                f"{comparison.bytes / comparison.reference_bytes:.0%}",
                f"{scores.perplexity:.3f}",
                f"{1 / scores.recovery(Metric.PERPLEXITY) - 1:+.2%}",
                f"{scores.kl:.4f}",
                f"{scores.top1:.1%}",
            )
        )
    rows = [(*row, f"{generations[row[0]].tokens / generations[row[0]].seconds:.1f}") for row in rows]
    title = f"{comparisons[RECIPES[0]].scores.tokens} tokens of {data.text}, "
    title += f"{len(data.windows)} windows of {data.windows[0].shape[1]}"
    numbers = ("MB", "size", "perplexity", "change", "KL", "top-1", "tokens/s")
    console.print(table(("model",), numbers, rows, title))
    console.print(_CAPTION)
    for name, generation in generations.items():
        continuation = (generation.continuation.rstrip(), "green")
        console.print(Text.assemble((name, "bold"), f": {PROMPT}", continuation))


def _float_row(comparison: Comparison) -> tuple[str, ...]:
    size, perplexity = comparison.reference_bytes, comparison.scores.reference_perplexity
    return _FLOAT, f"{size / 1e6:.1f}", "100%", f"{perplexity:.3f}", "+0.00%", "", ""
