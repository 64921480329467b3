"""What a key/value cache in MX formats costs: KL divergence and perplexity by context length, and needle retrieval.

    python benchmarks/cache.py --text validation.txt --out benchmarks/results/cache.jsonl

SmolLM2-135M-Instruct, weights in float. Attention is `numerics.cached_attention`, so one forward over a window is
teacher-forced generation: every token reads the cache as it would have been after generating all tokens before it.
`kl` is the mean KL(float || cache) a token in nats. `+values` behind a format rotates values, folded into the weights
of v_proj and o_proj. A needle is a five-digit number in the text, found if all its tokens are the most likely ones.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.numerics.cache_format import CacheFormat, head_rotation
from mxcompile.numerics.cached_attention import cached_attention
from mxcompile.numerics.hadamard import rotate_input, rotate_weight
from mxcompile.numerics.metrics import kl_divergence, negative_log_likelihood, perplexity

NAME: Final = "mx_cached"
VALUES: Final = "+values"
FLOAT: Final = "key=none,value=none"
FORMATS: Final = (
    "mxint8",
    "key=mxfp8,value=mxfp8",
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
    "key=mxint4,value=mxint4,window=32,sink=4,rotate=head+values",
    "key=mxfp4,value=mxfp4,window=32,rotate=head+values",
    "key=mxint4:16,value=mxint4:16,window=32,rotate=head+values",
)
QUESTION: Final = (
    "\n\nQuestion: What is the secret number of the red house?\nAnswer: The secret number of the red house is"
)
FACT: Final = "\nThe secret number of the red house is {}.\n"


class _Attention:
    """What transformers calls for attention: causal, over a cache of `format`."""

    def __init__(self) -> None:
        self.format = CacheFormat.parse(FLOAT)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        del module, mask  # windows have no padding
        if query.shape[2] != key.shape[2]:
            raise ValueError("this benchmark runs whole windows, not single tokens")
        output = cached_attention(query, key, value, None, scaling, True, self.format)
        return output.transpose(1, 2), None


def main() -> None:
    arguments = parser().parse_args()
    attention = _Attention()
    transformers.AttentionInterface.register(NAME, lambda *args, **kwargs: attention(*args, **_named(kwargs)))
    model, tokenizer = smollm2.load()
    model = model.to(arguments.device).eval()
    model.set_attn_implementation(NAME)
    models = {False: model, True: rotated_values(model)}
    ids = token_ids(tokenizer, read_text(arguments.text)).to(arguments.device)
    for length in arguments.lengths:
        windows = list(token_windows(ids, length, max(1, arguments.tokens // length), tokenizer=tokenizer))
        needles = list(hidden_needles(tokenizer, ids, length, arguments.needles))
        attention.format = CacheFormat.parse(FLOAT)
        exact = [run(model, window) for window in windows]
        for text in (FLOAT, *(arguments.formats or FORMATS)):
            attention.format = CacheFormat.parse(text.removesuffix(VALUES))
            row = measured(models[text.endswith(VALUES)], windows, exact, needles)
            row = {"cache": text, "context": length, "bytes": token_bytes(model.config, attention.format), **row}
            write(
                {"model": smollm2.NAME, **row, "text": arguments.text.name, "device": arguments.device}, arguments.out
            )


def measured(
    model: nn.Module,
    windows: list[Tensor],
    exact: list[Tensor],
    needles: list[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """KL and perplexity over windows of one length, given the float model's logits, and how many needles are found."""
    began, kl, nll = time.perf_counter(), 0.0, 0.0
    for window, expected in zip(windows, exact, strict=True):
        logits = run(model, window)
        kl += kl_divergence(expected, logits)
        nll += negative_log_likelihood(logits[0, :-1], window[0, 1:]) / (window.shape[1] - 1)
    found = [bool((run(model, text)[0, -len(answer) - 1 : -1].argmax(-1) == answer).all()) for text, answer in needles]
    row: dict[str, Any] = {"kl": round(kl / len(windows), 5), "perplexity": round(perplexity(nll / len(windows)), 4)}
    row |= {"tokens": sum(window.shape[1] for window in windows), "needles": f"{sum(found)}/{len(found)}"}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def run(model: nn.Module, window: Tensor) -> Tensor:
    """Logits `[1, tokens, vocabulary]`."""
    with torch.no_grad():
        return model(input_ids=window, use_cache=False).logits


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
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of context")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of all windows of a length")
    parser.add_argument("--needles", type=int, default=16, help="texts of each length with a number to find")
    parser.add_argument("--text", type=Path, required=True, help="a .txt file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


if __name__ == "__main__":
    main()
