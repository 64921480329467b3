"""The index of a checkpoint: Hugging Face's map from tensors to files, and what mxcompile has to know to trust them.

{"metadata": {"total_size": 1234, "mxcompile": {
    "schema": 1,
    "weights": {"q_proj.weight": {"format": "mxint4", "size": 576, "activation": "mxint8", ...}},
    "aliases": {"lm_head.weight": "embed_tokens.weight"},
    "temporary": ["rotary_emb.inv_freq"],
    "shards": {"model-00001-of-00001.safetensors": {"bytes": 1300, "header": 305419896}},
    "crc32": {"q_proj.weight": 2596069104}}},
 "weight_map": {"q_proj.weight": "model-00001-of-00001.safetensors"}}
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from mxcompile.checkpoint.checked_json import file_name, read_json, sha256, take, take_map, take_some
from mxcompile.checkpoint.shards import Shard
from mxcompile.checkpoint.stored_tensors import Names, Packing
from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.formats import parse_format, parse_scale_rule, why_not_aligned
from mxcompile.tensor.weight import MXLayout

SCHEMA: Final = 1
_DTYPES: Final = {
    str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
_LARGEST: Final = 2**48


@dataclass(frozen=True)
class Index:
    """names: what the tensors are. shards: the files, by name."""

    names: Names
    shards: Mapping[str, Shard]

    @classmethod
    def read(cls, path: Path, digest: str | None = None) -> "Index":
        """Read the file. digest: its SHA-256, None not to compare.

        Raises CheckpointError if it is another file, no such index, or contradicts itself.
        """
        data, content = read_json(path)
        if digest is not None and sha256(data) != digest:
            raise CheckpointError(f"{path} is not as it was saved: copy the checkpoint again, or save it again")
        try:
            return _parse(content)
        except MXCompileError as error:
            raise CheckpointError(f"{path} is not an index of mxcompile: {error}") from error

    def to_json(self) -> str:
        """The file's text."""
        tensors = {name: file for file, shard in self.shards.items() for name in shard.tensors}
        ours = {
            "schema": SCHEMA,
            "weights": {name: _write_packing(packing) for name, packing in self.names.weights.items()},
            "aliases": dict(self.names.aliases),
            "temporary": sorted(self.names.temporary),
            "shards": {name: {"bytes": shard.bytes, "header": shard.header} for name, shard in self.shards.items()},
            "crc32": {name: crc for shard in self.shards.values() for name, crc in shard.tensors.items()},
        }
        total = sum(shard.bytes for shard in self.shards.values())
        content = {"metadata": {"total_size": total, "mxcompile": ours}, "weight_map": tensors}
        return json.dumps(content, separators=(",", ":"))


def _parse(content: dict[str, Any]) -> Index:
    ours = take(take(content, "metadata", dict), "mxcompile", dict)
    if (schema := take(ours, "schema", int)) != SCHEMA:
        raise CheckpointError(f"it has schema {schema}, this version of mxcompile reads {SCHEMA}")
    weights = {name: _parse_packing(entry) for name, entry in take_map(ours, "weights", dict).items()}
    aliases = take_map(ours, "aliases", str)
    files = take_map(content, "weight_map", str)
    parts = {part for name, packing in weights.items() for part in packing.parts(name)}
    plain = tuple(name for name in (*files, *aliases) if name not in parts)
    temporary = frozenset(map(str, take(ours, "temporary", list)))
    names = Names(plain, weights, aliases, temporary)
    if names.stored() != set(files) or set(files) & set(aliases) or not temporary <= set(plain):
        raise CheckpointError("its tensors, their parts and their other names contradict each other")
    return Index(names, _parse_shards(ours, files))


def _parse_shards(ours: dict[str, Any], files: dict[str, str]) -> dict[str, Shard]:
    checksums = take_map(ours, "crc32", int)
    shards = {
        file_name(name, ".safetensors"): Shard(
            take(entry, "bytes", int),
            take(entry, "header", int),
            {tensor: checksums[tensor] for tensor, file in files.items() if file == name and tensor in checksums},
        )
        for name, entry in take_map(ours, "shards", dict).items()
    }
    if set(files) != set(checksums) or set(files.values()) != set(shards):
        raise CheckpointError("its map of tensors to files has gaps")
    return shards


def _write_packing(packing: Packing) -> dict[str, Any]:
    """Without what is not so or not there."""
    written = {key: value for key, value in asdict(packing.layout).items() if value}
    return written | {"dtype": str(packing.dtype).removeprefix("torch.")}


def _parse_packing(entry: dict[str, Any]) -> Packing:
    activation, rule = take_some(entry, "activation", str), take_some(entry, "rule", str)
    rotation = take_some(entry, "rotation", int)
    layout = MXLayout(
        str(parse_format(take(entry, "format", str))),
        take(entry, "size", int),
        take_some(entry, "transposed", bool) or False,
        None if activation is None else str(parse_format(activation)),
        None if rule is None else str(parse_scale_rule(rule)),
        take_some(entry, "multiplier", str),
        rotation,
        take_some(entry, "aligned", bool) or False,
    )
    dtype = take(entry, "dtype", str)
    if not 0 < layout.size < _LARGEST or (activation is None) != (rule is None) or dtype not in _DTYPES:
        raise CheckpointError(f"{entry} describes no weight")
    if rotation is not None and (rotation < 1 or rotation & (rotation - 1) or layout.size % rotation):
        raise CheckpointError(f"{entry} describes no weight: {rotation} is no power of two that divides {layout.size}")
    if layout.aligned and (reason := why_not_aligned(None if activation is None else parse_format(activation))):
        raise CheckpointError(f"{entry} describes no weight: {reason}")
    if rule is not None:
        parse_scale_rule(rule).threshold(parse_format(str(activation)))
    packing = Packing(layout, _DTYPES[dtype])
    if _write_packing(packing) != entry:
        raise CheckpointError(f"{entry} says more of a weight than this version of mxcompile understands")
    return packing
