"""KL divergence of quantized key/value caches, ours beside transformers' `QuantizedCache`, one token at a time.

    pip install optimum-quanto hqq
    python benchmarks/cache_peers.py --device cuda --text validation.txt --out benchmarks/results/cache-peers.jsonl

SmolLM2-135M-Instruct in float. A peer gets windows of text, first a prompt and then token by token, as generation
would fill it, all windows as one batch; ours are `numerics.cached_attention` with that prompt, which computes the
same in one pass. `kl` is the mean KL(float || cache) a token behind the prompt, in nats. `QuantizedCache` keeps the
newest tokens exact, at most `residual`, and then rounds the whole cache anew. `bits` are those of a value beyond the
exact tokens, scales and zero points included, both in half precision as the caches of models in half precision have
them. A peer that is not installed, or that this transformers does not have, is left out with a line. `+values` as in
`cache.py`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from cache import NAME, VALUES, rotated_values
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, QuantizedCache
from transformers.generation import GenerateDecoderOnlyOutput

from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention
from mxcompile.numerics.metrics import kl_divergence

FLOAT: Final = "float"
GROUP: Final = 64
OURS: Final = (
    "mxint8",
    "key=mxint8,value=mxint4,window=32+values",
    "key=mxint4,value=mxint4,window=32,rotate=head+values",
    "key=mxint4,value=mxint4,window=128,rotate=head+values",
    "key=mxfp4,value=mxfp4,window=32,rotate=head+values",
)
PEERS: Final = (
    *(f"{backend} int4 residual={residual}" for backend in ("quanto", "hqq") for residual in (128, 32)),
    "hqq int8 residual=128",
    "fp8",
)


def main() -> None:
    arguments = parser().parse_args()
    model, tokenizer = smollm2.load()
    model = model.to(arguments.device).eval()
    ids = token_ids(tokenizer, read_text(arguments.text)).to(arguments.device)
    count = arguments.tokens // arguments.length
    windows = torch.cat(list(token_windows(ids, arguments.length, count, tokenizer=tokenizer)))
    with torch.no_grad():
        exact = torch.cat([model(input_ids=part, use_cache=False).logits for part in windows.split(4)])
        for name in arguments.caches or (FLOAT, *OURS, *PEERS):
            began = time.perf_counter()
            try:
                kl, bits = measured(name, model, windows, exact, arguments.prompt)
            except (ImportError, ValueError) as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            row: dict[str, Any] = {"model": smollm2.NAME, "cache": name, "context": arguments.length, "bits": bits}
            row |= {"kl": round(kl, 5), "tokens": windows.numel()}
            row |= {"seconds": round(time.perf_counter() - began, 1), "text": arguments.text.name}
            row |= {"device": arguments.device}
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def measured(name: str, model: Any, windows: Tensor, exact: Tensor, prompt: int) -> tuple[float, float]:
    """(mean KL a token behind the prompt, bits of a value). Raises ImportError or ValueError for a missing peer."""
    config = model.config
    if name == FLOAT:
        return generated_kl(model, windows, exact, DynamicCache(config=config), prompt), 16.0
    if name not in PEERS:
        form = CacheFormat.parse(name.removesuffix(VALUES))
        size = config.hidden_size // config.num_attention_heads
        bits = form.bytes_per_token(1, size, size) * 8 / (2 * size)
        return kl_of_ours(rotated_values(model) if name.endswith(VALUES) else model, windows, exact, form, prompt), bits
    backend, _, rest = name.partition(" ")
    if backend == "fp8":
        return generated_kl(model, windows, exact, QuantizedCache(backend, config), prompt), 8.0
    nbits, residual = map(int, rest.removeprefix("int").split(" residual="))
    axis = 1 if backend == "hqq" else 0  # both: groups of 64 values of a token
    options: dict[str, int] = {"axis_key": axis, "axis_value": axis, "q_group_size": GROUP}
    cache = QuantizedCache(backend, config, nbits=nbits, residual_length=residual, **options)
    return generated_kl(model, windows, exact, cache, prompt), nbits + 32 / GROUP


def kl_of_ours(model: Any, windows: Tensor, exact: Tensor, form: CacheFormat, prompt: int) -> float:
    """As `generated_kl`, in one pass."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        del module, mask  # windows have no padding
        return cached_attention(query, key, value, None, scaling, True, form, prompt).transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        parts = zip(windows.split(4), exact.split(4), strict=True)
        pairs = [(model(input_ids=part, use_cache=False).logits, expected) for part, expected in parts]
    finally:
        model.set_attn_implementation(before)
    return sum(kl_divergence(other[:, prompt:], one[:, prompt:]) * len(one) for one, other in pairs) / len(windows)


def generated_kl(model: Callable[..., Any], windows: Tensor, exact: Tensor, cache: Any, prompt: int) -> float:
    """Mean KL a token, over windows `[windows, tokens]` read one token at a time behind a prompt."""
    # transformers renamed the argument in 5.24, with the field of its results
    name = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
    total, length = 0.0, windows.shape[1]
    model(input_ids=windows[:, :prompt], **{name: cache}, use_cache=True, logits_to_keep=1)
    for place in range(prompt, length):
        logits = model(input_ids=windows[:, place : place + 1], **{name: cache}, use_cache=True).logits
        total += kl_divergence(exact[:, place], logits[:, 0])
    return total / (length - prompt)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caches", nargs="*", help="default: all")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a window that are read at once")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of all windows")
    parser.add_argument("--text", type=Path, required=True, help="a .txt file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


if __name__ == "__main__":
    main()
