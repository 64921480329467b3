"""Seconds, peak memory and bytes of model-free quantization of a random model in the shape of Llama-3-8B.

    python benchmarks/model_free.py --work /tmp/model-free --layers 32 --workers 2 --out benchmarks/results/large.jsonl
    python benchmarks/model_free.py --work /tmp/model-free --layers 32 --device cuda --workers 4 --out ...

The model (bfloat16, the same bits every time) is written to WORK file by file unless it is there; 32 layers take 16 GB.
The run has a process of its own, which has quantized a tiny model before, so that all is imported. `peak bytes` is how
much the process grew from there at most: mapped pages of files count. `device peak bytes` is what torch held on the
GPU. `files read` says whether the files were in the page cache: they are read once before the run if so. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SHAPE: Final = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192},
}
_RUN: Final = """
import json, sys, time
import torch
import mxcompile

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

tiny, source, out, recipe, device, workers = sys.argv[1:]
options = {"recipe": recipe, "device": device, "workers": int(workers)}
mxcompile.quantize_files(tiny, out + "-tiny", **options)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
began = time.perf_counter()
plan = mxcompile.quantize_files(source, out, **options)
result = {"seconds": round(time.perf_counter() - began, 1), "peak bytes": status("VmHWM") - before}
if torch.cuda.is_available() and device != "cpu":
    result["device peak bytes"] = torch.cuda.max_memory_allocated()
tensors = plan.tensors
result |= {"source bytes": sum(each.before for each in tensors), "result bytes": sum(each.after for each in tensors)}
result["largest tensor bytes"] = max(each.before for each in tensors)
print(json.dumps(result))
"""


def write_model(folder: Path, layers: int, **changes: int) -> None:
    """A random model, a file for each layer; nothing is done if the folder has its config.json, written last."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**{**SHAPE, **changes}, num_hidden_layers=layers, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.bfloat16).mul_(columns**-0.5)

    groups: list[dict[str, Any]] = []
    for layer in range(layers):
        path = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
        }
        shapes |= {
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
        }
        shapes |= {"mlp.down_proj": (hidden, inner)}
        norms = [f"{path}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        groups.append({f"{path}.{name}.weight": shape for name, shape in shapes.items()} | dict.fromkeys(norms))
    table = (config.vocab_size, hidden)
    groups += [{"model.embed_tokens.weight": table}, {"lm_head.weight": table, "model.norm.weight": None}]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        ones = torch.ones(hidden, dtype=torch.bfloat16)
        tensors = {name: ones.clone() if shape is None else matrix(*shape) for name, shape in group.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    work = Path(arguments.work)
    source, tiny, out = work / f"model-{arguments.layers}", work / "tiny", work / "quantized"
    write_model(source, arguments.layers)
    write_model(
        tiny, 1, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=1, vocab_size=64
    )
    for left in (out, work / "quantized-tiny"):
        shutil.rmtree(left, ignore_errors=True)
    if arguments.cached:
        for path in source.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    options = [arguments.recipe, arguments.device, str(arguments.workers)]
    command = [sys.executable, "-c", _RUN, str(tiny), str(source), str(out), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = {"benchmark": "model-free", "recipe": arguments.recipe, "device": arguments.device}
    row |= {
        "layers": arguments.layers,
        "workers": arguments.workers,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    row |= {"files read": "before" if arguments.cached else "in the run", "load": round(os.getloadavg()[0], 1)}
    if arguments.device != "cpu":
        row["gpu"] = torch.cuda.get_device_name()
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="/tmp/model-free", help="folder for the model and the result")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipe", default="w4a16-mxfp-quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="read the files into the page cache before the run")
    parser.add_argument("--out", help="file to add the record to")
    arguments = parser.parse_args()
    line = json.dumps(measure(arguments))
    print(line)
    if arguments.out:
        with Path(arguments.out).open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
