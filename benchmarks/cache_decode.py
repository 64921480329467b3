"""Tokens a second and prefill with a key/value cache in MX formats, beside the float cache, in a whole compiled model.

    python benchmarks/cache_decode.py --lengths 2048 32768 --out cache-decode-h200.jsonl
    python benchmarks/cache_decode.py --device cpu --prompt 32 --processes 1 --lengths 2048 8192

On a GPU Llama-3-8B's shape, `--layers` of its 32, random weights, every layer a copy of the first; on a CPU
SmolLM2-135M in bfloat16. Weights are as `--recipe` quantizes them ("head mxint8": the output head too), batch 1, static
caches with room for the prompt and the generated tokens, greedy. `prompt_ms` is the time to the first token after a
prompt of `context` tokens, `token_ms` the mean time between two tokens after it; both are medians over `--rounds` calls
of `generate`, or as many as begin within `--seconds`. `prompt_least_ms` is the shortest. `..._kernels_ms`, of one more
call each on a GPU, is the time in which at least one kernel runs. A step over a static float cache reads all of it, and
so does one over a packed cache on a CPU: `--prompt 32` then times the same step without the long prompt. On a GPU
packed attention reads no further than to its own token: the prompt must be as long as the cache.

Each cache and length has a process of its own. `--processes` of them, or all, compile side by side, for no other length
of a prompt; then they take turns, a call each, while the others wait. Each call is printed when it ends.
With `--check N`, lengths up to N are compared with the same model, uncompiled, which reads prompt and generated tokens
in one pass with `numerics.cached_attention`: `same` of `tokens` are its most likely token, and no other has a logit
that is lower than the highest by more than `off` standard deviations of all logits.
"""

import argparse
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import transformers
from llama_8b import busy_us, by_step, kernels, quantized, wait
from llama_8b import show as show_kernels
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention

FLOAT: Final = "key=none,value=none"
"""transformers' own static cache."""
CACHES: Final = (FLOAT, "mxint8", "key=mxint8,value=mxint4", "mxint4")
OPTIONS: Final = (
    *("device", "recipe", "layers", "size", "tokens", "rounds", "seconds", "check", "threads", "patience", "prompt"),
)
TIMES: Final = ("token_ms", "token_kernels_ms", "prompt_ms", "prompt_least_ms", "prompt_kernels_ms")
NAME: Final = "mx_cached"
_PROFILED: Final = 16
"""Tokens of the call whose steps are profiled."""
_TINY: Final[dict[str, Any]] = {
    **{"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1},
    **{"num_hidden_layers": 2, "vocab_size": 1024, "max_position_embeddings": 65536, "dtype": "bfloat16"},
}


def main() -> None:
    arguments = parser().parse_args()
    if arguments.way:
        measure(arguments, *arguments.way.split(":"), Path(arguments.meeting))
        return
    ways = [f"{cache}:{length}" for length in arguments.lengths for cache in arguments.caches]
    failed: list[str] = []
    rows: list[dict[str, Any]] = []
    remaining = iter(ways)
    while group := list(islice(remaining, arguments.processes or len(ways))):
        with TemporaryDirectory() as meeting:
            command = [sys.executable, __file__, *(f"--{name}={getattr(arguments, name)}" for name in OPTIONS)]
            command += [f"--meeting={meeting}", f"--waits={len(group)}"]
            command += [f"--out={arguments.out.resolve()}"] if arguments.out else []
            began = [subprocess.Popen([*command, f"--way={way}"]) for way in group]
            failed += [way for way, process in zip(group, began, strict=True) if process.wait()]
            rows += [json.loads(file.read_text()) for file in Path(meeting).glob("*.row")]
    show(sorted(rows, key=lambda row: (row["context"], arguments.caches.index(row["cache"]))))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(arguments: argparse.Namespace, cache: str, length: str, meeting: Path) -> None:
    """One process: prepare, wait for the others, measure, write a row."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    context, name = int(length), f"{cache}:{length}"
    row: dict[str, Any] = {"cache": cache, "context": context}
    with ready(meeting, name, arguments.waits, arguments.patience):
        model, ids = prepared(arguments, arguments.prompt or context)
        config, form = model.config, CacheFormat.parse(cache)
        made = static_cache(config, cache, context + arguments.tokens + 1, model.device)
        began = time.perf_counter()
        for _ in range(2):  # whatever the first call leaves to the second
            tokens, _ = generated(model, ids, made, arguments.tokens)
        row |= {"prompt": ids.shape[1], "compile_s": round(time.perf_counter() - began, 1)}
        print(json.dumps(row), flush=True)
    row |= timed(model, ids, made, arguments, meeting)
    row["cache_bytes"] = sum(part.nbytes for part in held(made))
    row["refusal"] = getattr(vars(model).get("_compiled_call"), "refusal", None)
    if context <= arguments.check:
        plain, _ = prepared(arguments, 1, compiled=False)
        row |= compared(plain, tokens, form, ids.shape[1])
    row |= {"device": arguments.device, "recipe": arguments.recipe, "layers": config.num_hidden_layers}
    row |= {"heads": f"{config.num_attention_heads}/{config.num_key_value_heads}", "torch": torch.__version__}
    row |= {"threads": torch.get_num_threads()} if arguments.device == "cpu" else {}
    print(json.dumps(row), flush=True)
    (meeting / f"{name}.row").write_text(json.dumps(row))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def static_cache(config: Any, cache: str, room: int, device: torch.device) -> Any:
    """With room for so many tokens, and its tensors: a call that made them would be compiled by itself."""
    made: Any = StaticCache(config=config, max_cache_len=room)
    if cache != FLOAT:
        made = mxcompile.MXCache.of(config, CacheFormat.parse(cache), room)
    made.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.bfloat16, device)
    return made


def timed(model: Any, ids: Tensor, cache: Any, arguments: argparse.Namespace, meeting: Path) -> dict[str, float]:
    """Milliseconds of a prompt and of a token."""
    prompts, tokens, spent = list[float](), list[float](), 0.0
    while len(prompts) < arguments.rounds and spent < arguments.seconds:
        with alone(meeting):
            began = time.perf_counter()
            _, (first, second, *_, last) = generated(model, ids, cache, arguments.tokens)
            spent += time.perf_counter() - began
        prompts.append(first)
        tokens.append((last - second) / (arguments.tokens - 2))
        name = f"{arguments.way}, call {len(prompts)}"
        print(f"{name}: prompt {first * 1e3:.3f} ms, token {tokens[-1] * 1e3:.4f} ms", flush=True)
    times = {"prompt_ms": median(prompts), "prompt_least_ms": min(prompts), "token_ms": median(tokens)}
    if ids.is_cuda:
        with alone(meeting):
            prompt = kernels(lambda: generated(model, ids, cache, 1))
            steps = by_step(kernels(lambda: generated(model, ids, cache, _PROFILED)), _PROFILED)
            show_kernels(prompt)
            show_kernels(steps[-1] if steps else [])
        times["prompt_kernels_ms"] = busy_us(prompt) / 1e6
        times["token_kernels_ms"] = median(map(busy_us, steps)) / 1e6 if steps else float("nan")
    return {"rounds": len(prompts)} | {name: round(value * 1e3, 4) for name, value in times.items()}


class Clock(BaseStreamer):
    """Records when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Of the prompt or a token."""
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to record."""


def generated(model: Any, ids: Tensor, cache: Any, count: int) -> tuple[Tensor, list[float]]:
    """(prompt and `count` more tokens `[1, tokens]`, seconds to each of these), the cache being empty before."""
    cache.reset()
    # transformers renamed the argument in 5.24, with the field of its results
    name = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
    clock = Clock()
    wait()
    began = time.perf_counter()
    tokens = model.generate(ids, **{name: cache}, max_new_tokens=count, do_sample=False, streamer=clock)
    wait()
    return tokens, [each - began for each in clock.times[-count:]]


@torch.no_grad()
def compared(model: Any, tokens: Tensor, form: CacheFormat, context: int) -> dict[str, float]:
    """The generated tokens beside what the uncompiled model finds most likely, given all tokens before."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        del module, mask  # one text without padding
        return cached_attention(query, key, value, None, scaling, True, form, context).transpose(1, 2), None

    transformers.AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)
    kept = tokens.shape[1] - context + 1
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[0, :-1].float()
    chosen = logits.gather(-1, tokens[0, context:, None])[:, 0]
    off = (logits.max(-1).values - chosen) / logits.std(-1)
    return {"same": int((off == 0).sum()), "tokens": kept - 1, "off": round(float(off.max()), 4)}


@contextmanager
def ready(meeting: Path, name: str, count: int, patience: float) -> Generator[None]:
    """Do the work inside, and then wait until `count` processes have done theirs, or for so many seconds."""
    try:
        yield
    finally:
        (meeting / f"{name}.ready").touch()
    end = time.monotonic() + patience
    while len(list(meeting.glob("*.ready"))) < count and time.monotonic() < end:
        time.sleep(0.1)


@contextmanager
def alone(meeting: Path) -> Generator[None]:
    """While no other process measures, and after those that have waited longer."""
    with (meeting / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(0.1)


def held(cache: Any) -> list[Tensor]:
    """The tensors of a static cache."""
    if isinstance(cache, mxcompile.MXCache):
        return [part for layer in cache.layers for part in layer.tensors]
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def prepared(arguments: argparse.Namespace, length: int, *, compiled: bool = True) -> tuple[Any, Tensor]:
    """(a quantized model, ids of a prompt `[1, length]`)"""
    torch.manual_seed(0)
    if arguments.device == "cuda" and not arguments.size:
        model = quantized(arguments.recipe, arguments.layers, compiled)
        ids = torch.randint(100000, (1, length), device="cuda")
    else:
        source, ids = (tiny if arguments.size else smollm)(arguments.device, length)
        example = {"input_ids": ids[:, :16]}
        options: dict[str, Any] = {"recipe": arguments.recipe, "probe": False, "compile": compiled}
        model = mxcompile.quantize_and_compile(source, example, **options)
    model.generation_config.eos_token_id = None
    return model, ids


def tiny(device: str, length: int) -> tuple[Any, Tensor]:
    """(a model with random weights, random ids `[1, length]`)"""
    config = LlamaConfig(**_TINY)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval(), torch.randint(config.vocab_size, (1, length))


def smollm(device: str, length: int) -> tuple[Any, Tensor]:
    """(SmolLM2 in bfloat16, ids of a text `[1, length]`)"""
    model, tokenizer = smollm2.load(torch.bfloat16)
    ids = tokenizer(help_text()[: 20 * length], return_tensors="pt").input_ids[:, :length]
    return model.eval().to(device), ids.to(device)


def show(rows: list[dict[str, Any]]) -> None:
    """Milliseconds, and how many times as fast as the float cache."""
    names = [name for name in TIMES if any(name in row for row in rows)]
    headings = [part for name in names for part in (name.removesuffix("_ms").replace("_", " "), "")]
    table = Table("context", "cache", *headings, "MB", "same", "off", box=None)
    floats = {row["context"]: row for row in rows if row["cache"] == FLOAT}
    for row in rows:
        cells = [str(row["context"]), row["cache"]]
        for name in names:
            float_row = floats.get(row["context"])
            cells += [f"{row[name]:.3f}", f"{float_row[name] / row[name]:.3f}x" if float_row else ""]
        same = f"{row['same']}/{row['tokens']}" if "same" in row else ""
        table.add_row(*cells, f"{row['cache_bytes'] / 1e6:.1f}", same, str(row.get("off", "")))
    Console(width=160).print(table)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="", choices=("", "tiny"), help="a random Llama, for trials")
    parser.add_argument("--recipe", default="w4a8-mxint-quick", help='"..., head mxint8" too, on a GPU')
    parser.add_argument("--caches", nargs="+", default=list(CACHES), help="cache formats: %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32768], help="tokens of the prompt")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prompt, if not the whole length")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="after which a process begins no further round")
    parser.add_argument("--check", type=int, default=0, help="compare with the uncompiled model up to this length")
    parser.add_argument("--processes", type=int, default=0, help="that prepare side by side; default: all")
    parser.add_argument("--threads", type=int, default=0, help="of a process on the CPU")
    parser.add_argument("--patience", type=float, default=900, help="seconds that a process waits for the others")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    for hidden in ("--way", "--meeting"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--waits", type=int, default=1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
