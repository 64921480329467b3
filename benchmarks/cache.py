"""What a key/value cache in MX formats costs: KL divergence and perplexity by context length, and needle retrieval.

    python benchmarks/cache.py --text validation.txt --out benchmarks/results/cache.jsonl

SmolLM2-135M-Instruct, weights in float, or as `--recipes` quantize them on `--calibration`. Attention is
`numerics.cached_attention`, so one forward over a window is teacher-forced generation: every token reads the cache as
it would have been after generating all tokens before it. `kl` is the mean KL(float || cache) a token in nats,
`kl_recipe` that from the quantized model with a float cache. A recipe that has a cache, as w4a8-mxint-kv4, is measured
with its own and with a float one. `+values` behind a format rotates values, folded into the
weights of v_proj and o_proj. A needle is a five-digit number in the text, found if all its tokens are the most likely
ones.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

import mxcompile
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.checkpoint.hf.cached_forward import cache_of
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.numerics.cache_format import CacheFormat, head_rotation
from mxcompile.numerics.cached_attention import cached_attention
from mxcompile.numerics.hadamard import rotate_input, rotate_weight
from mxcompile.numerics.metrics import kl_divergence, negative_log_likelihood, perplexity

NAME: Final = "mx_cached"
VALUES: Final = "+values"
FLOAT: Final = "key=none,value=none"
FP8: Final = "fp8, one scale"
"""E4M3 with one scale for a layer's keys and one for its values, the smallest that fits, as other projects do."""
FORMATS: Final = (
    "mxint8",
    "key=mxfp8,value=mxfp8",
    FP8,
    "key=mxint6,value=mxint6",
    "key=mxfp6_e2m3,value=mxfp6_e2m3",
    "mxint4",
    "key=mxfp4,value=mxfp4",
    "key=mxint4,value=none",
    "key=none,value=mxint4",
    "key=mxint8,value=mxint4",
    "key=mxint8,value=mxint4+values",
    "key=mxint8,value=mxint4,window=32+values",
    "key=mxint8,value=mxint4:16+values",
    "key=mxint6,value=mxint4,rotate=head+values",
    "key=mxint6,value=mxint4,window=32,rotate=head+values",
    "key=mxint4,value=mxint4,rotate=head+values",
    "key=mxint4,value=mxint4,window=32,rotate=head+values",
    "key=mxint4,value=mxint4,window=64,rotate=head+values",
    "key=mxint4,value=mxint4,window=128,rotate=head+values",
    "key=mxint4,value=mxint4,window=32,sink=4,rotate=head+values",
    "key=mxfp4,value=mxfp4,window=32,rotate=head+values",
    "key=mxint8,value=mxint8,shift=mean",
    "key=mxint6,value=mxint6,shift=mean",
    "key=mxint8,value=mxint4,window=32,shift=mean+values",
    "key=mxint6,value=mxint4,window=32,rotate=head,shift=mean+values",
    "key=mxint4,value=mxint4,window=32,shift=mean+values",
    "key=mxint4,value=mxint4,window=32,rotate=head,shift=mean+values",
    "key=mxfp4,value=mxfp4,window=32,rotate=head,shift=mean+values",
    "key=mxint4:16,value=mxint4:16,window=32,rotate=head+values",
)
QUESTION: Final = (
    "\n\nQuestion: What is the secret number of the red house?\nAnswer: The secret number of the red house is"
)
FACT: Final = "\nThe secret number of the red house is {}.\n"


class _Attention:
    """What transformers calls for attention: causal, over a cache of `format`."""

    def __init__(self) -> None:
        self.format, self.is_fp8 = CacheFormat.parse(FLOAT), False

    def set(self, text: str) -> CacheFormat:
        """Take the format of a row. Returns it, or that of floats for FP8."""
        self.is_fp8 = text == FP8
        self.format = CacheFormat.parse(FLOAT if self.is_fp8 else text.removesuffix(VALUES))
        return self.format

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        del module, mask  # windows have no padding
        if query.shape[2] != key.shape[2]:
            raise ValueError("this benchmark runs whole windows, not single tokens")
        if self.is_fp8:
            key, value = in_fp8(key), in_fp8(value)
        output = cached_attention(query, key, value, None, scaling, True, self.format)
        return output.transpose(1, 2), None


def main() -> None:
    arguments = parser().parse_args()
    attention = _Attention()
    transformers.AttentionInterface.register(NAME, lambda *args, **kwargs: attention(*args, **_named(kwargs)))
    model, tokenizer = smollm2.load()
    model = model.to(arguments.device).eval()
    ids = token_ids(tokenizer, read_text(arguments.text)).to(arguments.device)
    models = {(None, False): model, (None, True): rotated_values(model)}
    formats = (FLOAT, *(arguments.formats or FORMATS))
    own: dict[str, tuple[str, ...]] = {}
    for recipe in arguments.recipes:
        models[recipe, False] = quantized(model, recipe, tokenizer, arguments)
        if (cache := cache_of(models[recipe, False])) is not None:
            own[recipe] = (FLOAT, str(cache))
        elif any(text.endswith(VALUES) for text in formats):
            models[recipe, True] = quantized(models[None, True], recipe, tokenizer, arguments)
    for one in models.values():
        one.set_attn_implementation(NAME)
    for length in arguments.lengths:
        windows = list(token_windows(ids, length, max(1, arguments.tokens // length), tokenizer=tokenizer))
        batches = list(torch.cat(windows).split(max(1, arguments.at_once // length)))
        needles = list(hidden_needles(tokenizer, ids, length, arguments.needles))
        attention.set(FLOAT)
        exact = [run(model, batch) for batch in batches]
        for recipe in arguments.recipes or [None]:
            attention.set(FLOAT)
            plain = [run(models[recipe, False], batch) for batch in batches] if recipe else exact
            for text in own.get(recipe, formats):
                form = attention.set(text)
                row = {"model": smollm2.NAME, "cache": text, "context": length}
                row |= {"bytes": token_bytes(model.config, form) // (2 if text == FP8 else 1)}
                row |= {"recipe": recipe} if recipe else {}
                row |= measured(models[recipe, text.endswith(VALUES)], batches, exact, plain, needles)
                write({**row, "text": arguments.text.name, "device": arguments.device}, arguments.out)


def quantized(model: Any, recipe: str, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """The model as a recipe quantizes it, on windows of the calibration text."""
    example = {"input_ids": torch.arange(64, device=arguments.device)[None]}
    batches = None
    if not recipe.endswith("-quick"):
        ids = token_ids(tokenizer, read_text(arguments.calibration)).to(arguments.device)
        windows = torch.cat(list(token_windows(ids, 512, arguments.windows, tokenizer=tokenizer)))
        batches = [{"input_ids": part} for part in windows.split(16)]
    return mxcompile.quantize_and_compile(model, example, recipe=recipe, calibration=batches, compile=False)


def measured(
    model: nn.Module,
    batches: list[Tensor],
    exact: list[Tensor],
    plain: list[Tensor],
    needles: list[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """KL and perplexity over windows `[windows, tokens]` of one length, and how many needles are found.

    exact: logits of the float model. plain: those of the model with a float cache; the same list if it is that model.
    """
    began, kl, beside, nll, count = time.perf_counter(), 0.0, 0.0, 0.0, 0
    for batch, expected, own in zip(batches, exact, plain, strict=True):
        logits = run(model, batch)
        kl += kl_divergence(expected, logits) * len(batch)
        beside += kl_divergence(own, logits) * len(batch) if plain is not exact else 0.0
        for window, scores in zip(batch, logits, strict=True):
            nll += negative_log_likelihood(scores[:-1], window[1:]) / (len(window) - 1)
        count += len(batch)
    found = sum(is_found(lambda text, kept: run(model, text, kept), *needle) for needle in needles)
    row: dict[str, Any] = {"kl": round(kl / count, 5)}
    row |= {} if plain is exact else {"kl_recipe": round(beside / count, 5)}
    row |= {"perplexity": round(perplexity(nll / count), 4), "tokens": sum(batch.numel() for batch in batches)}
    return row | {"needles": f"{found}/{len(needles)}", "seconds": round(time.perf_counter() - began, 1)}


def is_found(logits: Callable[[Tensor, int], Tensor], text: Tensor, answer: Tensor) -> bool:
    """Whether the last tokens of a text `[1, tokens]`, the answer, are each the most likely one."""
    return bool((logits(text, len(answer) + 1)[0, :-1].argmax(-1) == answer).all())


def run(model: Any, tokens: Tensor, kept: int = 0) -> Tensor:
    """Logits `[windows, tokens, vocabulary]`, of the last `kept` tokens if that is not 0."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits


def in_fp8(states: Tensor) -> Tensor:
    """Rounded to E4M3 with one scale."""
    scale = states.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return (states / scale).to(torch.float8_e4m3fn).to(states.dtype) * scale


def rotated_values(model: Any) -> Any:
    """A copy in which every value head is rotated: rows of v_proj, and columns of o_proj, which undo it."""
    rotated = copy.deepcopy(model)
    config = rotated.config
    size = config.hidden_size // config.num_attention_heads
    block = head_rotation(size)
    with torch.no_grad():
        for layer in rotated.model.layers:
            value, output = layer.self_attn.v_proj, layer.self_attn.o_proj
            value.weight.copy_(rotate_input(value.weight.T, block).T)
            output.weight.copy_(rotate_weight(output.weight, block))
    return rotated


def hidden_needles(tokenizer: Any, ids: Tensor, length: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(a text `[1, tokens]` that ends in the answer, the answer's tokens), with the fact at evenly spaced depths."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(10000, 99999, (count,), generator=generator).tolist()

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=ids.device)

    for index, number in enumerate(numbers):
        fact, question, answer = tokens(FACT.format(number)), tokens(QUESTION), tokens(f" {number}")
        room = length - len(fact) - len(question) - len(answer)
        start = int(torch.randint(0, len(ids) - room, (1,), generator=generator))
        hay, depth = ids[start : start + room], round(room * index / count)
        yield torch.cat((hay[:depth], fact, hay[depth:], question, answer))[None], answer


def token_bytes(config: Any, cache: CacheFormat) -> int:
    """Bytes of a token, of all layers, beyond the window; float is half precision."""
    size = config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * cache.bytes_per_token(config.num_key_value_heads, size, size)


def _named(options: dict[str, Any]) -> dict[str, Any]:
    return {"scaling": options["scaling"]}


def write(row: dict[str, Any], out: Path | None) -> None:
    """Print a record, and append it to a file."""
    if math.isnan(row["kl"]):
        raise ValueError(f"not a number: {row}")
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="*", help="cache formats; default: a list")
    parser.add_argument("--recipes", nargs="*", default=[], help="quantize the weights so; default: float")
    parser.add_argument("--calibration", type=Path, help="a .txt file, for recipes without -quick")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--at-once", type=int, default=4096, help="tokens in a forward pass, at least a window")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of context")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of all windows of a length")
    parser.add_argument("--needles", type=int, default=16, help="texts of each length with a number to find")
    parser.add_argument("--text", type=Path, required=True, help="a .txt file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


if __name__ == "__main__":
    main()
