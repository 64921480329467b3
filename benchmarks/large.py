"""How long quantizing a model of Llama-3-8B's shape takes on a GPU, and its peak of GPU memory.

    python benchmarks/large.py --layers 4 --out benchmarks/results/large-h100.jsonl

Random bfloat16 weights, random tokens, `--layers` of its 32 decoder layers. All 32 are reckoned to take what one takes,
plus 31 times what one more takes: `(t(n) - t(1)) / (n - 1)`. Calibration in batches of four windows. Peak memory is
reckoned as that of n layers, plus twice the weights of the layers left out: the model's own and the rounded copy's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.passes.recipes import as_pipeline

FORMATS: Final = "weight=mxint4,activation=mxint8"
PIPELINES: Final = {
    "rtn": "w4a8-mxint-quick",
    "gptq": f"gptq{{format=mxint4,activation=mxint8}} | lower-mx{{{FORMATS}}}",
    "awq-fold, gptq": f"awq-fold{{{FORMATS}}} | gptq{{format=mxint4,activation=mxint8,correction=0.25}} "
    f"| lower-mx{{{FORMATS}}}",
}
LAYERS: Final = 32


def build(layers: int, device: str) -> Any:
    """Llama-3-8B's shape with fewer layers."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, rope_theta=500000.0, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def measure(layers: int, recipe: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """(seconds from the model to its deployed copy, GiB at most)."""
    model = build(layers, arguments.device)
    generator = torch.Generator(device=arguments.device).manual_seed(0)
    ids = torch.randint(
        model.config.vocab_size, (arguments.windows, arguments.length), generator=generator, device=arguments.device
    )
    batches = [{"input_ids": part} for part in ids.split(4)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    program = mxcompile.trace(model, {"input_ids": ids[:1, :64]})
    lowered = as_pipeline(recipe).run(program, batches)
    mxcompile.deploy(lowered, model, check=False)
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pipelines", default="rtn,gptq", help=f"of {', '.join(PIPELINES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="add the results here, one JSON object a line")
    arguments = parser.parse_args()
    measure(1, PIPELINES["rtn"], argparse.Namespace(**{**vars(arguments), "windows": 4}))  # imports, compiled kernels
    layer_gib = sum(p.numel() * p.element_size() for p in build(1, "meta").model.layers.parameters()) / 2**30
    for name in arguments.pipelines.split(","):
        one, _ = measure(1, PIPELINES[name], arguments)
        several, peak = measure(arguments.layers, PIPELINES[name], arguments)
        layer = (several - one) / (arguments.layers - 1)
        row = {"model": "Llama-3-8B shape, random", "pipeline": name, "layers": arguments.layers}
        row |= {"calibration": f"{arguments.windows}x{arguments.length}", "seconds": round(several, 1)}
        row |= {"seconds_one_layer": round(one, 1), "seconds_a_layer": round(layer, 2)}
        row |= {"seconds_32_layers": round(one + (LAYERS - 1) * layer, 1), "peak_gib": round(peak, 2)}
        row |= {"peak_gib_32_layers": round(peak + 2 * layer_gib * (LAYERS - arguments.layers), 2)}
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": 0}
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
