"""`config.json` of a checkpoint: the file whose rename commits a save.

It names the index under `transformers_weights`, which transformers follows too. `quantization_config` holds the recipe,
package versions, and the SHA-256 of the index, of the auxiliary files (tokenizer, generation config) and of itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mxcompile.checkpoint.checked_json import file_name, read_json, relative_path, sha256, take, take_map
from mxcompile.checkpoint.index import SCHEMA
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import CheckpointError
from mxcompile.numerics.cache_format import CacheFormat

CONFIG: Final = "config.json"
METHOD: Final = "mxcompile"
_WEIGHTS, _QUANTIZATION = "transformers_weights", "quantization_config"
_BLANK: Final = "0" * 64


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` says: how a checkpoint was made, and which files belong to it.

    class_name: of the saved module. index, index_sha256: name of the index file and its SHA-256. files: SHA-256 of each
    auxiliary file. model_config: the model's own configuration, empty for a module without one.
    """

    class_name: str
    provenance: Provenance | None
    index: str
    index_sha256: str
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    model_config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, folder: Path, *, verify: bool = True) -> "CheckpointConfig":
        """Read the file of a folder. verify: False accepts a file that was edited.

        Raises CheckpointError if the folder holds no model that mxcompile saved, or a damaged one.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no saved model: it has no {CONFIG}")
        data, content = read_json(path)
        ours = _ours(folder, content)
        try:
            config = _parse(content, ours)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if verify and not _is_unchanged(data, str(ours.get("sha256"))):
            raise CheckpointError(
                f"{path} has changed since it was saved: restore it; if you changed it on purpose, load with "
                "verify=False and save again"
            )
        return config

    def to_json(self) -> bytes:
        """The file's content."""
        ours = {
            "quant_method": METHOD,
            "schema": SCHEMA,
            "module": self.class_name,
            "recipe": self.provenance and self.provenance.recipe,
            "versions": dict(self.provenance.versions) if self.provenance else {},
            **({"cache": str(self.provenance.cache)} if self.provenance and self.provenance.cache else {}),
            "index_sha256": self.index_sha256,
            "files": {relative_path(name): digest for name, digest in self.files.items()},
            "sha256": _BLANK,
        }
        content = dict(self.model_config) | {_WEIGHTS: self.index, _QUANTIZATION: ours}
        text = json.dumps(content, indent=2) + "\n"
        return text.replace(_BLANK, sha256(text.encode())).encode()


def untie(config: Any) -> None:
    """State in a model's config that its embeddings are not tied."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _ours(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config`; raises CheckpointError if mxcompile did not write it or its schema is unknown."""
    ours = content.get(_QUANTIZATION)
    if not isinstance(ours, dict):
        raise CheckpointError(
            f"{folder} holds a model that is not quantized: mxcompile.load reads what mxcompile.save wrote"
        )
    method = ours.get("quant_method")  # pyright: ignore[reportUnknownVariableType]
    if method != METHOD:
        raise CheckpointError(f"{folder} holds a model quantized by {method!r}, not one that mxcompile.save wrote")
    if ours.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder} was saved with schema {ours.get('schema')!r}, this version of mxcompile reads {SCHEMA}: use the "
            "version that saved it, or a newer one"
        )
    return ours  # pyright: ignore[reportUnknownVariableType]


def _is_unchanged(data: bytes, digest: str) -> bool:
    """True if a file has the digest that it states; the digest was computed with zeros in its place."""
    return len(digest) == len(_BLANK) and sha256(data.replace(digest.encode(), _BLANK.encode())) == digest


def _parse(content: dict[str, Any], ours: dict[str, Any]) -> CheckpointConfig:
    recipe = None if ours.get("recipe") is None else take(ours, "recipe", str)
    cache = None if ours.get("cache") is None else CacheFormat.parse(take(ours, "cache", str))
    return CheckpointConfig(
        take(ours, "module", str),
        None if recipe is None else Provenance(recipe, take_map(ours, "versions", str), cache),
        file_name(take(content, _WEIGHTS, str), ".safetensors.index.json"),
        take(ours, "index_sha256", str),
        {relative_path(name): digest for name, digest in take_map(ours, "files", str).items()},
        {key: value for key, value in content.items() if key not in (_WEIGHTS, _QUANTIZATION)},
    )
