"""Where the time of a prompt goes on a CPU: matmuls, decoding, rounding, output head, attention; and another attention.

    python benchmarks/prefill_parts.py --out benchmarks/results/prefill-parts-cpu.jsonl

SmolLM2-135M's shapes in bfloat16, MXINT4 weights and MXINT8 activations, one prompt. CPU time of one thread, the least
of `--repeats` calls, so that other programs disturb it little. All but the head are 30 times one layer's.

`attention` is torch's kernel with a causal mask, as transformers gives it in a compiled graph. `attention in rows` are
two matmuls and a softmax for 64 queries at a time, with all keys; `with the keys before` leaves out those that no query
of the 64 sees. Their scores are rounded to bfloat16, those of torch's kernel are float32: `error` is that of the output
(Euclidean norms) from float64, where queries and keys are normal numbers times 2, so that scores differ by tens.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.kernels.cpu import linears

LAYERS, HEADS, SIZE, VOCABULARY, ROWS = 30, 9, 64, 49152, 64
MATMULS = {"qkv": (960, 576), "o": (576, 576), "gate and up": (3072, 576), "down": (576, 1536)}


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for tokens in map(int, arguments.tokens.split(",")):
        row = {"tokens": tokens, "repeats": arguments.repeats, "torch": torch.__version__}
        row |= parts_of_matmuls(tokens, arguments.repeats) | parts_of_attention(tokens, arguments.repeats)
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="512,1024", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def parts_of_matmuls(tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of all layers' matmuls, of decoding their weights and rounding their inputs, and of the head."""
    total: dict[str, float] = dict.fromkeys(("matmuls", "decoding", "rounding"), 0.0)
    for out, size in MATMULS.values():
        x, weight = (torch.randn(rows, size, dtype=torch.bfloat16) for rows in (tokens, out))
        elements = torch.randint(256, (out, size // 2), dtype=torch.uint8)
        scales = torch.full((out, size // 32), 120, dtype=torch.uint8)
        buffer = linears.decoding_buffer(out * size, torch.bfloat16)

        def decode(
            elements: Tensor = elements, scales: Tensor = scales, size: int = size, buffer: Tensor = buffer
        ) -> Tensor:
            return linears.decode(elements, scales, MXINT4, size, torch.bfloat16, buffer)

        def round_input(x: Tensor = x) -> Tensor:
            return linears.quantize_dequantize(x, MXINT8, ScaleRule.FLOOR)

        def multiply(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return F.linear(x, weight)

        for name, call in (("matmuls", multiply), ("decoding", decode), ("rounding", round_input)):
            total[name] += LAYERS * milliseconds(call, repeats)
    x, head = (torch.randn(rows, 576, dtype=torch.bfloat16) for rows in (tokens, VOCABULARY))
    total["head of all tokens"] = milliseconds(lambda: F.linear(x, head), repeats)
    total["head of the last token"] = milliseconds(lambda: F.linear(x[-1:], head), repeats)
    return {name: round(value, 1) for name, value in total.items()}


def parts_of_attention(tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of all layers' attention in three ways, and errors of their outputs."""
    query, key, value = (torch.randn(1, HEADS, tokens, SIZE, dtype=torch.bfloat16) * scale for scale in (2, 2, 1))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)
    ways: dict[str, Callable[[], Tensor]] = {
        "attention": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
        "attention in rows": lambda: attend_in_rows(query, key, value, mask, before=False),
        "attention in rows, with the keys before": lambda: attend_in_rows(query, key, value, mask, before=True),
    }
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask.double())
    result: dict[str, float] = {}
    for name, call in ways.items():
        result[name] = round(LAYERS * milliseconds(call, repeats), 1)
        result[f"error of {name}"] = float(f"{float((call() - exact).norm() / exact.norm()):.2g}")
    return result


def attend_in_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, before: bool) -> Tensor:
    """Attention, `ROWS` queries at a time. before: only with keys up to the last of these queries."""
    result, scaled, across = torch.empty_like(query), query * SIZE**-0.5, key.transpose(-1, -2)
    for start in range(0, query.shape[2], ROWS):
        part, keys = slice(start, start + ROWS), slice(start + ROWS if before else None)
        scores = torch.matmul(scaled[:, :, part], across[..., keys]).add_(mask[:, :, part, keys])
        result[:, :, part] = torch.matmul(torch.softmax(scores, -1), value[:, :, keys])
    return result


def milliseconds(call: Callable[[], Tensor], repeats: int) -> float:
    """The least CPU time of this thread in some calls after a first one."""
    call()
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        call()
        best = min(best, time.thread_time() - began)
    return best * 1e3


if __name__ == "__main__":
    with torch.no_grad():
        main()
