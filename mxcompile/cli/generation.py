"""Greedy generation: what `mxcompile generate` and `mxcompile demo` have in common."""

import time
from dataclasses import dataclass
from typing import Any

from mxcompile.tensor.modules import device_of


@dataclass(frozen=True)
class Generation:
    """text: prompt and continuation. tokens, seconds: number of generated tokens and the time for all of them."""

    text: str
    continuation: str
    tokens: int
    seconds: float


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    new_tokens: int,
    *,
    min_new_tokens: int | None = None,
    static_cache: bool = False,
    streamer: Any = None,
) -> Generation:
    """Continue a prompt greedily.

    static_cache: required for a compiled decode step. streamer: a streamer of transformers.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    ids = inputs["input_ids"]
    began = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        cache_implementation="static" if static_cache else None,
        streamer=streamer,
    )[0]
    seconds = time.perf_counter() - began
    text, continuation = (tokenizer.decode(part, skip_special_tokens=True) for part in (output, output[ids.shape[1] :]))
    return Generation(text, continuation, len(output) - ids.shape[1], seconds)
