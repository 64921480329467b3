"""Tokens a second of greedy decoding and prefill on the CPU: a quantized model beside the float baseline.

    python benchmarks/decode.py --out benchmarks/results/decode-cpu.jsonl
    python benchmarks/decode.py --model qwen3-moe --prefill 256 --out benchmarks/results/experts-cpu.jsonl

SmolLM2-135M-Instruct or a small mixture of experts (8 layers, 8 of 32 experts a token, random bfloat16 weights), batch
1, static cache, through `generate`. `decode` is `--tokens` tokens after a prompt of
`--prompt`, `prefill` one forward of `--prefill` tokens that fills the cache. The output head stays in float unless the
row says "head mxint8". `token_cpu_ms` is the CPU time of a generated token, which other work on the machine changes
less. `--spinning 4` measures beside so many processes that compute all the time. Each measurement has
a process of its own. Every row is measured `--rounds` times, one round after the other, and the best counts, as other
work on the machine can only slow one down. `--llama` adds llama.cpp on the file that SmolLM2 comes in
(`pip install llama-cpp-python`).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text
from mxcompile.formats import MXINT8

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER, COMPILED = "float eager", "float compiled"
HEAD: Final = "w4a8-mxint-quick, head mxint8"
WAYS: Final = (
    (EAGER, "float32"),
    (EAGER, "bfloat16"),
    (COMPILED, "float32"),
    (COMPILED, "bfloat16"),
    ("w4a8-mxint-quick", "float32"),
    ("w4a8-mxint-quick", "bfloat16"),
    (HEAD, "bfloat16"),
    ("w8a8-mxint-quick", "bfloat16"),
    ("w4a8-mxfp-quick", "bfloat16"),
)
LLAMA: Final = ("llama.cpp", "q4_1")
OPTIONS: Final = ("model", "tokens", "prompt", "prefill", "threads", "spinning")
SMOLLM2, MOE = "SmolLM2-135M-Instruct", "qwen3-moe"
UNCOMPILED: Final = " eager"
GROUPED: Final = ", grouped_mm"
"""transformers decodes by batched_mm, which copies the weights of all choices, unless the model says otherwise."""
MOE_WAYS: Final = (
    *((way + grouped, "bfloat16") for way in (EAGER, COMPILED) for grouped in ("", GROUPED)),
    *((f"w4{name}-quick{way}", "bfloat16") for name in ("a16-mxfp", "a8-mxint") for way in (UNCOMPILED, "")),
)
_KEPT: Final = "grouped_mm_for_decoding"
MOE_SIZES: Final[dict[str, Any]] = {
    **{"vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "head_dim": 64},
    **{"num_key_value_heads": 4, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 8},
    **{"max_position_embeddings": 4096, "norm_topk_prob": True},
}


def main() -> None:
    arguments = parser().parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments, *arguments.way.split(":"))))
        return
    ways = [way for way in (WAYS if arguments.model == SMOLLM2 else MOE_WAYS) if way[1] in arguments.dtypes.split(",")]
    ways = [way for way in ways if arguments.ways is None or way[0] in arguments.ways.split(";")]
    ways += [LLAMA] if arguments.llama else []
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for way in ways:
            row = in_process(arguments, way)
            fastest = best.setdefault(way, row)
            for name in ("decode", "prefill"):
                fastest[name] = max(fastest[name], row[name])
            if "token_cpu_ms" in row:
                fastest["token_cpu_ms"] = min(fastest["token_cpu_ms"], row["token_cpu_ms"])
    rows = list(best.values())
    show(rows)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, choices=(SMOLLM2, MOE))
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the generated ones")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the timed prefill")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated: %(default)s")
    parser.add_argument("--ways", help="only these rows, separated by ;")
    parser.add_argument("--spinning", type=int, default=0, help="processes that compute all the time beside it")
    parser.add_argument("--llama", action="store_true", help="measure llama.cpp, too")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser


def in_process(arguments: argparse.Namespace, way: tuple[str, str]) -> dict[str, Any]:
    """One measurement in a process of its own, without the compiled code and the memory of the others."""
    options = [f"--{name}={getattr(arguments, name)}" for name in OPTIONS]
    command = [sys.executable, __file__, *options, f"--way={':'.join(way)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(way)} failed:\n{done.stderr[-3000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def measured(arguments: argparse.Namespace, what: str, dtype: str) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    about = {"model": arguments.model, "way": what, "dtype": dtype, "threads": arguments.threads}
    about |= {"prompt": arguments.prompt, "tokens": arguments.tokens, "prefill_tokens": arguments.prefill}
    about |= {"spinning": arguments.spinning} if arguments.spinning else {}
    if what == LLAMA[0]:
        return about | llama(arguments)
    model, ids = prepared(what, DTYPES[dtype], arguments)
    versions = {"torch": torch.__version__, "transformers": importlib.import_module("transformers").__version__}
    with torch.no_grad():
        return about | rates(model, ids, arguments) | versions


def prepared(what: str, dtype: torch.dtype, arguments: argparse.Namespace) -> tuple[Any, Tensor]:
    """(the model ready to run, token ids `[1, prefill]`)"""
    model, ids = (loaded if arguments.model == SMOLLM2 else random_experts)(arguments.prefill)
    model = model.to(dtype).eval()
    if what.endswith(GROUPED):
        keep_grouped_mm(model)
    kind = what.removesuffix(GROUPED)
    if kind == EAGER:
        return model, ids
    if kind == COMPILED:
        model.compile()
        return model, ids
    head: Any = {"include": ["lm_head"], "overrides": {"lm_head": MXINT8}} if what == HEAD else {}
    recipe, compiled = what.partition(",")[0].removesuffix(UNCOMPILED), not what.endswith(UNCOMPILED)
    example = {"input_ids": ids[:, :16]}
    return mxcompile.quantize_and_compile(model, example, recipe=recipe, compile=compiled, **head), ids


def loaded(tokens: int) -> tuple[Any, Tensor]:
    """(SmolLM2, ids of a text `[1, tokens]`)"""
    model, tokenizer = smollm2.load()
    return model, tokenizer(help_text()[: 20 * tokens], return_tensors="pt").input_ids[:, :tokens]


def random_experts(tokens: int) -> tuple[Any, Tensor]:
    """(a mixture of experts, ids `[1, tokens]`), both random"""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(dtype="bfloat16", **MOE_SIZES)
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model, torch.randint(config.vocab_size, (1, tokens))


def keep_grouped_mm(model: Any) -> None:
    """Decode by grouped_mm: transformers replaces this name, and only this one, by batched_mm."""
    moe = importlib.import_module("transformers.integrations.moe")
    moe.ExpertsInterface.register(_KEPT, moe.grouped_mm_experts_forward)
    model.set_experts_implementation(_KEPT)


def rates(model: Any, ids: Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second, decoding and prefill, and the CPU time of all threads for a generated token."""
    prompt = ids[:, : arguments.prompt]

    def generate(count: int) -> None:
        options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
        model.generate(prompt, cache_implementation="static", **options)

    def decode() -> None:
        generate(arguments.tokens + 2)

    for _ in range(2):
        generate(4)
    model(ids, use_cache=True)
    with spinning(arguments.spinning):
        prefill = seconds(lambda: model(ids, use_cache=True))[0]
        first, all_ = seconds(lambda: generate(2)), seconds(decode)
        return {
            "decode": round(arguments.tokens / (all_[0] - first[0]), 1),
            "prefill": round(arguments.prefill / prefill, 1),
            "token_cpu_ms": round(1e3 * (all_[1] - first[1]) / arguments.tokens, 1),
        }


@contextmanager
def spinning(count: int) -> Generator[None]:
    """Beside so many processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """The least of three calls after a warm-up: of the clock, and of CPU time."""
    call()
    best = (float("inf"), float("inf"))
    for _ in range(3):
        began = time.perf_counter(), time.process_time()
        call()
        best = min(best[0], time.perf_counter() - began[0]), min(best[1], time.process_time() - began[1])
    return best


def llama(arguments: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp's Python binding on the same file, greedy."""
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit("--llama: pip install llama-cpp-python")
    llama_cpp = importlib.import_module("llama_cpp")
    text = help_text()[: 20 * arguments.prefill]
    model = llama_cpp.Llama(str(smollm2.fetch()), n_threads=arguments.threads, n_ctx=2048, verbose=False)
    tokens = model.tokenize(text.encode())[: arguments.prefill]

    def evaluate(count: int) -> None:
        model.reset()
        model.eval(tokens[:count])

    def decode(count: int) -> None:
        evaluate(arguments.prompt)
        for _ in range(count):
            model.eval([model.sample(temp=0.0)])

    with spinning(arguments.spinning):
        prefill = seconds(lambda: evaluate(arguments.prefill))[0]
        first, all_ = seconds(lambda: decode(2))[0], seconds(lambda: decode(arguments.tokens + 2))[0]
    rates = {"decode": arguments.tokens / (all_ - first), "prefill": arguments.prefill / prefill}
    return {name: round(value, 1) for name, value in rates.items()} | {"llama-cpp-python": llama_cpp.__version__}


def show(rows: list[dict[str, Any]]) -> None:
    """Tokens a second, and their ratio to those of the fastest float row."""
    table = Table("", "dtype", "decode, tokens/s", "", "prefill, tokens/s", "", box=None)
    floats = [row for row in rows if row["way"].startswith((EAGER, COMPILED))]
    fastest = {name: max((row[name] for row in floats), default=None) for name in ("decode", "prefill")}
    for row in rows:
        cells = [f"{row[name]:.1f}" for name in fastest]
        ratios = ["" if best is None else f"{row[name] / best:.2f}x" for name, best in fastest.items()]
        table.add_row(row["way"], row["dtype"], cells[0], ratios[0], cells[1], ratios[1])
    Console().print(table)


if __name__ == "__main__":
    main()
