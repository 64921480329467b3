"""Checkpoints of random bfloat16 weights in the shapes of Llama-3, written shard by shard.

    python benchmarks/random_llama.py FOLDER --size 70b --layers 80

Values are made on a GPU where there is one, and are then others than on a CPU. A folder that has a config.json, which
is written last, is kept as it is. Layers from the one numbered `--filled` on are holes in their files: they are read as
zeros and take no room on the disk.
"""

import argparse
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mxcompile.checkpoint.shards import PendingTensor, split, write

SIZES: Final[dict[str, dict[str, Any]]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1},
}
_LARGE: Final = ("8b", "70b")
_SHARD: Final = 2 * 10**9  # bytes
_THREADS: Final = 4


def config_of(size: str, layers: int | None = None) -> LlamaConfig:
    """layers: the size's own number if not given."""
    sizes = dict(SIZES[size])
    large = size in _LARGE
    heads = {"num_key_value_heads": 8 if large else 1, "vocab_size": 128256 if large else 128}
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    rope = {"rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return LlamaConfig(**sizes, **heads, **rope, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def write_checkpoint(
    folder: Path, size: str, layers: int | None = None, threads: int = _THREADS, filled: int | None = None
) -> Path:
    """The folder, written unless it is there. filled: layers that have values, all if not given."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(size, layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pending = {name: _random(name, value.shape) for name, value in model.state_dict().items()}
    holes = {name: tensor for name, tensor in pending.items() if filled is not None and _layer(name) >= filled}
    full = split({name: tensor for name, tensor in pending.items() if name not in holes}, _SHARD)
    groups = full + (split(holes, _SHARD) if holes else [])
    files = {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}

    def write_one(file: str) -> None:
        (_write_holes if set(files[file]) <= set(holes) else write)(folder / file, files[file])

    with ThreadPoolExecutor(threads if torch.cuda.is_available() else 1) as pool:
        list(pool.map(write_one, files))
    _write_index(folder, pending, {name: file for file, group in files.items() for name in group})
    config.save_pretrained(folder)
    return folder


def _write_index(folder: Path, pending: Mapping[str, PendingTensor], files: dict[str, str]) -> None:
    index = {"metadata": {"total_size": sum(each.nbytes for each in pending.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _layer(name: str) -> int:
    """The number of a tensor's layer, -1 outside of layers."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


def _write_holes(path: Path, tensors: Mapping[str, PendingTensor]) -> None:
    """A safetensors file whose values are a hole."""
    entries, end = dict[str, Any](), 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def _random(name: str, shape: torch.Size) -> PendingTensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make() -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator(device).manual_seed(int(sha256(name.encode()).hexdigest()[:8], 16))
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(std=shape[-1] ** -0.5, generator=generator)

    return PendingTensor(torch.bfloat16, shape, make)


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, help="the size's own if not given")
    parser.add_argument("--filled", type=int, help="layers with values; the others are holes")
    parser.add_argument("--threads", type=int, default=_THREADS, help="files at a time, with a GPU")
    arguments = parser.parse_args()
    written = write_checkpoint(arguments.folder, arguments.size, arguments.layers, arguments.threads, arguments.filled)
    print(written)


if __name__ == "__main__":
    main()
