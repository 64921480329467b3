"""Tokens a second and prefill with a key/value cache in MX formats, beside the float cache, in a whole compiled model.

    python benchmarks/cache_decode.py --lengths 2048 32768 --layers 8 --out cache-decode-h200.jsonl
    python benchmarks/cache_decode.py --device cpu --prompt 32 --processes 1 --lengths 2048 8192

On a GPU a Llama-3-8B of fewer layers, its vocabulary smaller in proportion, random bfloat16 weights; on a CPU
SmolLM2-135M in bfloat16. Weights are as `--recipe` quantizes them, batch 1, static caches with room for the prompt and
the generated tokens, greedy. `prompt_ms` is the time to the first token after a prompt of `context` tokens, `token_ms`
the mean time between two tokens after it, from the shortest of `--rounds` calls for each. A step over a static float
cache reads all of it, and so does one over a packed cache on a CPU: `--prompt 32` then times the same step without the
long prompt. On a GPU packed attention reads no further than to its own token: the prompt must be as long as the cache.

Each cache and length has a process of its own. `--processes` of them, or all, compile side by side; then each is timed
while the others wait.
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
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention

FLOAT: Final = "key=none,value=none"
"""transformers' own static cache."""
CACHES: Final = (FLOAT, "mxint8", "key=mxint8,value=mxint4", "mxint4")
OPTIONS: Final = ("device", "recipe", "layers", "size", "tokens", "rounds", "check", "threads", "patience", "prompt")
NAME: Final = "mx_cached"
_LLAMA: Final[dict[str, Any]] = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"rope_theta": 500000.0, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5},
}
_TINY: Final[dict[str, Any]] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
_LAYERS: Final = 32
_VOCABULARY: Final = 128256


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
    torch.manual_seed(0)
    load = smollm if arguments.device == "cpu" and not arguments.size else llama
    source, ids = load(arguments, arguments.prompt or context)
    source.generation_config.eos_token_id = None
    example = {"input_ids": ids[:, :16]}
    options: dict[str, Any] = {"recipe": arguments.recipe, "probe": False}
    row: dict[str, Any] = {"cache": cache, "context": context, "prompt": ids.shape[1]}
    form, config = CacheFormat.parse(cache), source.config
    made = static_cache(config, cache, context + arguments.tokens + 1)
    with ready(meeting, name, arguments.waits, arguments.patience):
        model = mxcompile.quantize_and_compile(source, example, **options)
        began = time.perf_counter()
        for _ in range(3):
            tokens = generated(model, ids, made, arguments.tokens)
        row["compile_s"] = round(time.perf_counter() - began, 1)
    with alone(meeting):
        row |= timed(model, ids, made, arguments)
    row["cache_bytes"] = sum(part.nbytes for part in held(made))
    row["refusal"] = getattr(vars(model).get("_compiled_call"), "refusal", None)
    if context <= arguments.check:
        plain = mxcompile.quantize_and_compile(source, example, compile=False, **options)
        row |= compared(plain, tokens, form, ids.shape[1])
    row |= {"device": arguments.device, "recipe": arguments.recipe, "layers": config.num_hidden_layers}
    row |= {"heads": f"{config.num_attention_heads}/{config.num_key_value_heads}", "torch": torch.__version__}
    row |= {"threads": torch.get_num_threads()} if arguments.device == "cpu" else {}
    print(json.dumps(row), flush=True)
    (meeting / f"{name}.row").write_text(json.dumps(row))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def static_cache(config: Any, cache: str, room: int) -> Any:
    """With room for so many tokens."""
    if cache == FLOAT:
        return StaticCache(config=config, max_cache_len=room)
    return mxcompile.MXCache.of(config, CacheFormat.parse(cache), room)


def timed(model: Any, ids: Tensor, cache: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a prompt and of a token."""
    prompts, wholes = list[float](), list[float]()
    for _ in range(arguments.rounds):
        first, whole = (seconds(model, ids, cache, count) for count in (1, arguments.tokens))
        prompts.append(first)
        wholes.append(whole)
    token = (min(wholes) - min(prompts)) / (arguments.tokens - 1)
    return {"prompt_ms": round(min(prompts) * 1e3, 3), "token_ms": round(token * 1e3, 4)}


def seconds(model: Any, ids: Tensor, cache: Any, count: int) -> float:
    """Of a call of `generate` that fills an empty cache."""
    wait()
    began = time.perf_counter()
    generated(model, ids, cache, count)
    wait()
    return time.perf_counter() - began


def generated(model: Any, ids: Tensor, cache: Any, count: int) -> Tensor:
    """Prompt and `count` more tokens `[1, tokens]`."""
    cache.reset()
    # transformers renamed the argument in 5.24, with the field of its results
    name = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
    return model.generate(ids, **{name: cache}, max_new_tokens=count, do_sample=False)


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
    """While no other process measures."""
    with (meeting / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held(cache: Any) -> list[Tensor]:
    """The tensors of a static cache."""
    if isinstance(cache, mxcompile.MXCache):
        return [part for layer in cache.layers for part in layer.tensors]
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def llama(arguments: argparse.Namespace, length: int) -> tuple[Any, Tensor]:
    """(a model with random weights, random ids `[1, length]`)"""
    vocabulary = _VOCABULARY * arguments.layers // _LAYERS
    sizes = {**_LLAMA, **(_TINY if arguments.size == "tiny" else {})}
    if arguments.size == "tiny":
        sizes["num_key_value_heads"] = 1
    config = LlamaConfig(**sizes, vocab_size=vocabulary, num_hidden_layers=arguments.layers, dtype="bfloat16")
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        return model, torch.randint(vocabulary, (1, length))


def smollm(arguments: argparse.Namespace, length: int) -> tuple[Any, Tensor]:
    """(SmolLM2 in bfloat16, ids of a text `[1, length]`)"""
    del arguments
    model, tokenizer = smollm2.load(torch.bfloat16)
    return model.eval(), tokenizer(help_text()[: 20 * length], return_tensors="pt").input_ids[:, :length]


def wait() -> None:
    """For what a GPU still computes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(rows: list[dict[str, Any]]) -> None:
    """Milliseconds, and how many times as fast as the float cache."""
    table = Table("context", "cache", "token, ms", "", "prompt, ms", "", "MB", "same", "off", box=None)
    floats = {row["context"]: row for row in rows if row["cache"] == FLOAT}
    for row in rows:
        cells = [str(row["context"]), row["cache"]]
        for name in ("token_ms", "prompt_ms"):
            float_row = floats.get(row["context"])
            cells += [f"{row[name]:.3f}", f"{float_row[name] / row[name]:.3f}x" if float_row else ""]
        same = f"{row['same']}/{row['tokens']}" if "same" in row else ""
        table.add_row(*cells, f"{row['cache_bytes'] / 1e6:.1f}", same, str(row.get("off", "")))
    Console(width=120).print(table)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="", choices=("", "8b", "tiny"), help="a random Llama, also on a CPU")
    parser.add_argument("--recipe", default="w4a8-mxint-quick")
    parser.add_argument("--caches", nargs="+", default=list(CACHES), help="cache formats: %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32768], help="tokens of the prompt")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prompt, if not the whole length")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
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
