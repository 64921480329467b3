"""Attention of one token over a packed key/value cache, beside the same in bfloat16, timed on a GPU.

    python benchmarks/cache_attention.py --out benchmarks/results/cache-attention-h200.jsonl
    python benchmarks/cache_attention.py --sweep mxint8,mxint4
    python benchmarks/cache_attention.py --alone --shapes 1x32768,1x8192 --formats mxint8,mxint4 --registers 168

Heads of Llama-3-8B: 32 query heads, 8 KV heads of 128, bfloat16. Every format is first checked against float64. Then
each call is launched many times in a CUDA graph, over caches of 400 MB in turn, more than L2 holds; `us` is the time of
a launch with the gap before it. `floor` is the time that a copy at `--bandwidth` takes to read the cache. Peers in the
same run: `attend`, this project's kernel of a bfloat16 cache, and torch's `scaled_dot_product_attention`, whose flash
kernel takes no mask. `next` is all that a decode step does: RoPE, rounding, the write to the cache, attention, and
rounding of its result. `exact` is attention of which the newest 32 and the first 4 tokens are exact. `ratio` is the
time of `attend`, or of its `next`, over that of the line. `--alone` leaves both out, and what they compile.
"""

# pyright: basic

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from math import nan
from pathlib import Path
from typing import Any, Final

import torch
from small_kernels import time_of

from mxcompile.formats import MXINT8, ScaleRule, activation_rule, parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.triton import split_k_counters
from mxcompile.kernels.triton.attention import one_token, packed_attention
from mxcompile.kernels.triton.attention.one_token import Config
from mxcompile.numerics import packed_attention as definition
from mxcompile.numerics import reference
from mxcompile.numerics.exact_tokens import ExactTokens, attend_packed_exact
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import QUANTIZE

HEADS, SHARED, SIZE = 32, 8, 128
FLOAT: Final = "bfloat16"
SCALE: Final = SIZE**-0.5
ROUNDING: Final = (MXINT8, ScaleRule.FLOOR)
BYTES: Final = 400e6
FORMATS: Final = "mxint8,mxfp8,mxint6,mxfp6_e3m2,mxfp6_e2m3,mxint4,mxfp4,mxint8+mxint4"
SHAPES: Final = ((1, 32768), (1, 2048), (1, 8192), (8, 8192))
KINDS: Final = tuple(
    Config(16, block, warps, stages, True, registers)
    for block, warps, stages, registers in (
        (64, 4, 3, 0),
        (64, 4, 3, 168),
        (64, 4, 3, 128),
        (64, 4, 4, 168),
        (128, 4, 3, 0),
        (128, 4, 3, 168),
        (128, 4, 4, 0),
        (128, 8, 3, 128),
    )
)
FLOAT_KINDS: Final = tuple(
    Config(16, block, warps, stages, True)
    for block, warps, stages in ((64, 8, 3), (64, 8, 4), (64, 4, 3), (64, 4, 4), (32, 4, 4), (128, 8, 3))
)
SPLITS: Final = {1: (16, 32, 47, 64), 8: (4, 6, 8)}
WINDOW, SINK = 32, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    parser.add_argument("--bandwidth", type=float, default=4.27, help="TB/s of a copy on this GPU")
    parser.add_argument("--formats", default=FORMATS, help="of keys and values, or of keys+values")
    parser.add_argument("--sweep", default="", help="formats of which all configs are timed, not only a model's")
    parser.add_argument(
        "--registers", type=int, default=0, help="of a thread at most: time a model's config with so many"
    )
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="batch x tokens: 1x32768,8x8192")
    parser.add_argument("--alone", action="store_true", help="attention without what else a step does")
    parser.add_argument("--processes", type=int, default=12, help="that compile kernels ahead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cache_attention.py needs a CUDA GPU, and this machine has none")
    prepare()
    names, swept = arguments.formats.split(","), [name for name in arguments.sweep.split(",") if name]
    jobs: list[tuple[str, Config | None]] = [(name, None) for name in (FLOAT, *names)]
    jobs += [(name, kind) for name in swept for kind in (KINDS if name != FLOAT else KINDS[:1])]
    limits = {name: limited(arguments.registers, 1, 4096, packed(name, *[random(1, 1, 1, SIZE)] * 2)) for name in names}
    jobs += [(name, config) for name in names for config in limits[name]]
    packed_swept = [name for name in swept if name != FLOAT]
    compile_job = partial(
        compile_ahead, alone=arguments.alone, batches=sorted({batch for batch, _ in arguments.shapes})
    )
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        problems = list(pool.map(compile_job, jobs))
    for problem in filter(None, problems):
        print(problem, flush=True)
    for name in names:
        for further in () if arguments.alone else (check_next, check_exact):
            further(name)
        check(name, [None, *limits[name], *(KINDS if name in swept else ())])
    measure = partial(rows, bandwidth=arguments.bandwidth, alone=arguments.alone)
    for batch, tokens in arguments.shapes:
        write(measure(batch, tokens, names, partial(limited, arguments.registers)), arguments.out)
    for batch, tokens in arguments.shapes if FLOAT in swept else ():
        write(float_rows(batch, tokens, arguments.bandwidth), arguments.out)
    for batch, tokens in arguments.shapes if packed_swept else ():
        write(measure(batch, tokens, packed_swept, every_config), arguments.out)


def shapes(text: str) -> list[tuple[int, int]]:
    """Those that an argument lists."""
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(batch), int(tokens)) for batch, tokens in pairs]


def limited(registers: int, batch: int, tokens: int, states: tuple[PackedStates, PackedStates]) -> list[Config]:
    """A model's config with so many registers a thread at most; none for 0."""
    config = packed_attention.config_for(tokens, batch * SHARED, *states, dependent=True)
    return [replace(config, registers=registers)] if registers else []


def every_config(batch: int, tokens: int, states: tuple[PackedStates, PackedStates]) -> list[Config]:
    """All that are swept."""
    del states
    pairs = product(KINDS, SPLITS[batch])
    return [replace(kind, splits=splits) for kind, splits in pairs if splits * kind.block <= tokens]


def write(lines: Iterator[dict[str, Any]], out: Path | None) -> None:
    """Print each line, and append it to a file, as soon as it is measured."""
    for row in lines:
        text = json.dumps(row | {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
        print(text, flush=True)
        if out:
            with out.open("a") as file:
                file.write(text + "\n")


def prepare() -> None:
    """Counters must exist before a CUDA graph is captured."""
    split_k_counters.device_counters(torch.device("cuda", torch.cuda.current_device()))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def packed(name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[PackedStates, PackedStates]:
    formats = [parse_format(part) for part in (name.split("+") * 2)[:2]]
    keys, values = (
        PackedStates(*QUANTIZE(states, str(fmt), str(activation_rule(fmt))), fmt, states.shape[3])
        for fmt, states in zip(formats, (key, value), strict=True)
    )
    return keys, values


def compile_ahead(job: tuple[str, Config | None], alone: bool, batches: list[int]) -> str | None:
    """Run a kernel once, in a process of its own, so that it is in Triton's cache."""
    name, kind = job
    try:
        prepare()
        if name == FLOAT:
            for batch in batches:
                query, cache = random(batch, 1, HEADS, SIZE).transpose(1, 2), [random(batch, SHARED, 8192, SIZE)] * 2
                mask = torch.ones(batch, 1, 1, 8192, dtype=torch.bool, device="cuda")
                one_token.attend(query, *cache, mask, SCALE)
                one_token.attend(query, *cache, None, SCALE)
                for config in () if alone else (None, *(FLOAT_KINDS if kind else ())):
                    float_step(batch, 8192, query, mask, [cache], config)(0)
            torch.cuda.synchronize()
            return None
        pair = packed(name, random(1, SHARED, 4096, SIZE), random(1, SHARED, 4096, SIZE))
        query, mask = (
            random(1, 1, HEADS, SIZE).transpose(1, 2),
            torch.ones(1, 1, 1, 4096, dtype=torch.bool, device="cuda"),
        )
        for given in (mask, None) if kind is None else (mask,):
            packed_attention.attend(query, *pair, given, SCALE, kind)
            if kind is None and given is not None and not alone:
                whole_step(name, 1, 4096, query, given, [pair])(0)
                exact_step(1, 4096, query, given, [pair])(0)
            torch.cuda.synchronize()
    except Exception as error:  # reported, and then left out
        return f"{job}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def check(name: str, kinds: list[Config | None]) -> None:
    """Against float64, with a mask, and equal bits on repeat."""
    for batch, tokens in ((1, 2048), (3, 1008), (1, 16)):
        query = random(batch, 1, HEADS, SIZE).transpose(1, 2)
        pair = packed(name, random(batch, SHARED, tokens, SIZE), random(batch, SHARED, tokens, SIZE))
        mask = torch.arange(tokens, device="cuda").expand(batch, 1, 1, tokens) >= tokens // 9
        expected = float64(query, *pair, mask)
        for kind in kinds:
            for splits in (1, 4, 16) if kind else (0,):
                if kind and splits > 1 and splits * kind.block > tokens + kind.block:
                    continue
                config = replace(kind, splits=splits) if kind else None
                y = packed_attention.attend(query, *pair, mask, SCALE, config)
                error = ((y.double() - expected).norm() / expected.norm()).item()
                again = packed_attention.attend(query, *pair, mask, SCALE, config)
                if not error < 4e-3 or not torch.equal(again, y):
                    print(f"WRONG {name}, batch {batch}, {tokens} tokens, {config}: {error}", flush=True)
    print(f"{name}: checked", flush=True)


def float64(query: torch.Tensor, keys: PackedStates, values: PackedStates, mask: torch.Tensor) -> torch.Tensor:
    key, value = (each.values(torch.float32).double().repeat_interleave(HEADS // SHARED, 1) for each in (keys, values))
    added = torch.where(mask, 0.0, -torch.inf).double()
    return (query.double() @ key.mT * SCALE + added).softmax(-1) @ value


def rows(
    batch: int, tokens: int, names: list[str], configs: Callable[..., list[Config]], bandwidth: float, alone: bool
) -> Iterator[dict[str, Any]]:
    """configs: further ones of packed states."""
    query = random(batch, 1, HEADS, SIZE).transpose(1, 2)
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device="cuda")
    size = batch * SHARED * tokens * SIZE * 4
    floats = [[random(batch, SHARED, tokens, SIZE) for _ in range(2)] for _ in range(max(2, int(BYTES / size) + 1))]
    launches = max(8, len(floats))
    known = {"batch": batch, "tokens": tokens}

    def line(name: str, us: float, count: float, base: float, **more: Any) -> dict[str, Any]:
        floor = count / bandwidth / 1e6
        measured = {"us": round(us, 2), "floor": round(floor, 2), "ratio": round(base / us, 3)}
        return {"kernel": name} | known | measured | more

    base = time_of(lambda i: one_token.attend(query, *floats[i % len(floats)], mask, SCALE), launches)
    yield line("attend", base, size, base)
    unmasked = time_of(lambda i: one_token.attend(query, *floats[i % len(floats)], None, SCALE), launches)
    yield line("attend", unmasked, size, base, masked=False)
    step = nan if alone else time_of(float_step(batch, tokens, query, mask, floats), launches)
    if not alone:
        yield line("attend_next", step, size, step)
    plain = torch.nn.functional.scaled_dot_product_attention
    flash = time_of(lambda i: plain(query, *floats[i % len(floats)], scale=SCALE, enable_gqa=True), launches)
    yield line("torch", flash, size, base)
    for name in names:
        first = packed(name, *floats[0])
        count = sum(part.numel() for states in first for part in (states.elements, states.scales))
        pairs = [first, *(packed(name, *floats[i % len(floats)]) for i in range(1, int(BYTES / count) + 1))]
        launches = max(8, len(pairs))

        def run(given: Any, config: Config | None, number: int, pairs: Any = pairs) -> torch.Tensor:
            return packed_attention.attend(query, *pairs[number % len(pairs)], given, SCALE, config)

        yield line(name, time_of(partial(run, mask, None), launches), count, base, default=True)
        yield line(name, time_of(partial(run, None, None), launches), count, base, masked=False)
        if not alone:
            whole = whole_step(name, batch, tokens, query, mask, pairs)
            yield line(f"{name}, next", time_of(whole, launches), count, step, default=True)
            exact = exact_step(batch, tokens, query, mask, pairs)
            yield line(f"{name}, exact", time_of(exact, launches), count, base, default=True)
        for config in configs(batch, tokens, first):
            yield line(name, time_of(partial(run, mask, config), launches), count, base, **asdict(config))


def next_token(batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Key, value, position, cos and sin."""
    key, value = (random(batch, 1, SHARED, SIZE).transpose(1, 2) for _ in range(2))
    angles = 6 * torch.rand(1, 1, 1, SIZE // 2, device="cuda").repeat(1, 1, 1, 2)
    return key, value, torch.tensor([tokens - 2], device="cuda"), angles.cos().bfloat16(), angles.sin().bfloat16()


def float_step(
    batch: int, tokens: int, query: torch.Tensor, mask: torch.Tensor, caches: Any, config: Config | None = None
) -> Callable[[int], torch.Tensor]:
    """RoPE, the write to the cache, attention and rounding of its result, of a bfloat16 cache."""
    new = one_token.NewToken(*next_token(batch, tokens))
    return lambda i: one_token.attend(query, *caches[i % len(caches)], mask, SCALE, config, new, ROUNDING)


def float_rows(batch: int, tokens: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """All configs of attention over a bfloat16 cache."""
    query = random(batch, 1, HEADS, SIZE).transpose(1, 2)
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device="cuda")
    size = batch * SHARED * tokens * SIZE * 4
    floats = [[random(batch, SHARED, tokens, SIZE) for _ in range(2)] for _ in range(max(2, int(BYTES / size) + 1))]
    known, launches = {"kernel": "attend_next", "batch": batch, "tokens": tokens}, max(8, len(floats))
    base = time_of(float_step(batch, tokens, query, mask, floats), launches)
    for kind in FLOAT_KINDS:
        for splits in (*SPLITS[batch], 66):
            if splits * kind.block <= tokens:
                config = replace(kind, splits=splits)
                us = time_of(float_step(batch, tokens, query, mask, floats, config), launches)
                measured = {"us": round(us, 2), "floor": round(size / bandwidth / 1e6, 2), "ratio": round(base / us, 3)}
                yield known | measured | asdict(config)


def exact_tokens(batch: int, tokens: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Those of keys and values, the places of the newest, and the position of the query."""
    position, room = tokens - 2, WINDOW + 31
    places = torch.arange(max(0, position - room), position, device="cuda")
    held = torch.full((room,), -1, device="cuda")
    held[places % room] = places
    counts = (1, room, SINK)
    pairs = [ExactTokens(*(random(batch, SHARED, count, SIZE) for count in counts)) for _ in range(2)]
    return pairs, held, torch.tensor([position], device="cuda")


def exact_step(
    batch: int, tokens: int, query: torch.Tensor, mask: torch.Tensor, pairs: Any
) -> Callable[[int], torch.Tensor]:
    """Attention over packed caches of which some tokens are exact."""
    exact, *rest = exact_tokens(batch, tokens)

    def run(number: int) -> torch.Tensor:
        return dispatch.attend_packed_exact(query, query, pairs[number % len(pairs)], exact, *rest, WINDOW, mask, SCALE)

    return run


def check_exact(name: str) -> None:
    """Against the definition, and equal bits on repeat."""
    for batch, tokens in ((1, 2048), (3, 496), (1, 32)):
        query, turned = (random(batch, 1, HEADS, SIZE).transpose(1, 2) for _ in range(2))
        mask = torch.rand(batch, 1, 1, tokens, device="cuda") < 0.7
        states = packed(name, random(batch, SHARED, tokens, SIZE), random(batch, SHARED, tokens, SIZE))
        exact, held, position = exact_tokens(batch, tokens)
        mask[..., tokens - 2] = True
        given = (query, turned, states, (exact[0], exact[1]), held, position, WINDOW, mask, SCALE)
        y, again = (dispatch.attend_packed_exact(*given) for _ in range(2))
        expected = attend_packed_exact(*given)
        error = ((y.double() - expected.double()).norm() / expected.double().norm()).item()
        if not error < 5e-3 or not torch.equal(y, again):
            print(f"WRONG exact {name}, batch {batch}, {tokens} tokens: error {error}", flush=True)


def whole_step(
    name: str, batch: int, tokens: int, query: torch.Tensor, mask: torch.Tensor, pairs: Any
) -> Callable[[int], torch.Tensor]:
    """The same of a packed cache."""
    key, value, position, *rotation = next_token(batch, tokens)
    rules = [activation_rule(states.fmt) for states in pairs[0]]

    def run(number: int) -> torch.Tensor:
        states = pairs[number % len(pairs)]
        new, rope = (key, value), tuple(rotation)
        return dispatch.attend_packed_next(query, new, states, rules, position, rope, mask, SCALE, ROUNDING)

    return run


def check_next(name: str) -> None:
    """Packed bytes bit for bit those of the definition, and the result of attention beside it."""
    for batch, tokens in ((1, 2048), (3, 496)):
        query = random(batch, 1, HEADS, SIZE).transpose(1, 2)
        mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device="cuda")
        states = packed(name, random(batch, SHARED, tokens, SIZE), random(batch, SHARED, tokens, SIZE))
        key, value, position, *rotation = next_token(batch, tokens)
        rules = [activation_rule(side.fmt) for side in states]
        parts = [part for side in states for part in (side.elements, side.scales)]
        before = [part.clone() for part in parts]
        rope = tuple(rotation)
        turned = definition.append_packed(query, (key, value), states, rules, position, rope)
        after = [part.clone() for part in parts]
        expected = reference.quantize_dequantize(
            definition.attend_packed(turned, *states, mask, SCALE, position), *ROUNDING
        )
        for part, old in zip(parts, before, strict=True):
            part.copy_(old)
        y = dispatch.attend_packed_next(query, (key, value), states, rules, position, rope, mask, SCALE, ROUNDING)
        same = all(torch.equal(a, b) for a, b in zip(parts, after, strict=True))
        error = ((y.double() - expected.double()).norm() / expected.double().norm()).item()
        if not same or not error < 1e-2:
            print(f"WRONG next {name}, batch {batch}: equal bytes {same}, error {error}", flush=True)


if __name__ == "__main__":
    main()
