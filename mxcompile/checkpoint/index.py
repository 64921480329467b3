"""The index of a checkpoint: Hugging Face's map from tensors to files, plus MX metadata and checksums.

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

from mxcompile.checkpoint.checked_json import file_name, read_json, sha256, take, take_map, take_optional
from mxcompile.checkpoint.shards import ShardChecksums
from mxcompile.checkpoint.stored_tensors import TensorNames, WeightPacking
from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.formats import parse_format, parse_scale_rule
from mxcompile.tensor.dtypes import FLOAT_DTYPES, torch_name
from mxcompile.tensor.weight import MXLayout

SCHEMA: Final = 1
_LARGEST: Final = 2**48


@dataclass(frozen=True)
class CheckpointIndex:
    """names: how the module's tensors are stored. shards: sizes and checksums of the files, by file name."""

    names: TensorNames
    shards: Mapping[str, ShardChecksums]

    @classmethod
    def read(cls, path: Path, digest: str | None = None) -> "CheckpointIndex":
        """Read the file. digest: its expected SHA-256, None to skip that check.

        Raises CheckpointError if the digest differs, or the file is not an index of mxcompile or inconsistent.
        """
        data, content = read_json(path)
        if digest is not None and sha256(data) != digest:
            raise CheckpointError(f"{path} has changed since it was saved: copy the checkpoint again, or save it again")
        try:
            return _parse(content)
        except MXCompileError as error:
            raise CheckpointError(f"{path} is not an index of mxcompile: {error}") from error

    def to_json(self) -> str:
        """The file's text."""
        tensors = {name: file for file, shard in self.shards.items() for name in shard.tensors}
        ours = {
            "schema": SCHEMA,
            "weights": {name: write_packing(packing) for name, packing in self.names.weights.items()},
            "aliases": dict(self.names.aliases),
            "temporary": sorted(self.names.non_persistent),
            "shards": {name: {"bytes": shard.bytes, "header": shard.header} for name, shard in self.shards.items()},
            "crc32": {name: crc for shard in self.shards.values() for name, crc in shard.tensors.items()},
        }
        total = sum(shard.bytes for shard in self.shards.values())
        content = {"metadata": {"total_size": total, "mxcompile": ours}, "weight_map": tensors}
        return json.dumps(content, separators=(",", ":"))


def _parse(content: dict[str, Any]) -> CheckpointIndex:
    ours = take(take(content, "metadata", dict), "mxcompile", dict)
    if (schema := take(ours, "schema", int)) != SCHEMA:
        raise CheckpointError(f"its schema is {schema}, this version of mxcompile reads schema {SCHEMA}")
    weights = {name: parse_packing(entry) for name, entry in take_map(ours, "weights", dict).items()}
    aliases = take_map(ours, "aliases", str)
    files = take_map(content, "weight_map", str)
    parts = {part for name, packing in weights.items() for part in packing.parts(name)}
    plain = tuple(name for name in (*files, *aliases) if name not in parts)
    non_persistent = frozenset(map(str, take(ours, "temporary", list)))
    names = TensorNames(plain, weights, aliases, non_persistent)
    if names.stored() != set(files) or set(files) & set(aliases) or not non_persistent <= set(plain):
        raise CheckpointError("its lists of tensors, weights and aliases are inconsistent")
    return CheckpointIndex(names, _parse_shards(ours, files))


def _parse_shards(ours: dict[str, Any], files: dict[str, str]) -> dict[str, ShardChecksums]:
    checksums = take_map(ours, "crc32", int)
    shards = {
        file_name(name, ".safetensors"): ShardChecksums(
            take(entry, "bytes", int),
            take(entry, "header", int),
            {tensor: checksums[tensor] for tensor, file in files.items() if file == name and tensor in checksums},
        )
        for name, entry in take_map(ours, "shards", dict).items()
    }
    if set(files) != set(checksums) or set(files.values()) != set(shards):
        raise CheckpointError("its checksums, files and tensors are inconsistent")
    return shards


def write_packing(packing: WeightPacking) -> dict[str, Any]:
    """As JSON, without false and missing entries. An aligned activation format is two of them."""
    written = {key: value for key, value in asdict(packing.layout).items() if value}
    if packing.layout.activation is not None and (activation := parse_format(packing.layout.activation)).aligned:
        written |= {"activation": str(activation.with_alignment(False)), "aligned": True}
    return written | {"dtype": torch_name(packing.dtype)}


def parse_packing(entry: dict[str, Any]) -> WeightPacking:
    """What `write_packing` returned. Raises CheckpointError for anything else."""
    activation, rule = take_optional(entry, "activation", str), take_optional(entry, "rule", str)
    rotation = take_optional(entry, "rotation", int)
    aligned = take_optional(entry, "aligned", bool) or False
    if aligned and activation is None:
        raise CheckpointError(f"{entry} is not a valid weight: a float input cannot be aligned")
    layout = MXLayout(
        str(parse_format(take(entry, "format", str))),
        take(entry, "size", int),
        take_optional(entry, "transposed", bool) or False,
        None if activation is None else str(parse_format(activation).with_alignment(aligned)),
        None if rule is None else str(parse_scale_rule(rule)),
        take_optional(entry, "multiplier", str),
        rotation,
    )
    dtype = take(entry, "dtype", str)
    if not 0 < layout.size < _LARGEST or (activation is None) != (rule is None) or dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{entry} is not a valid weight")
    if rotation is not None and (rotation < 1 or rotation & (rotation - 1) or layout.size % rotation):
        raise CheckpointError(
            f"{entry} is not a valid weight: rotation {rotation} is not a power of two that divides {layout.size}"
        )
    if rule is not None:
        parse_scale_rule(rule).threshold(parse_format(str(activation)))
    packing = WeightPacking(layout, FLOAT_DTYPES[dtype])
    if write_packing(packing) != entry:
        raise CheckpointError(f"{entry} has entries that this version of mxcompile does not know")
    return packing
