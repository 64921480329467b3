"""`mxcompile.save`, and the `save_pretrained` of quantized models of transformers."""

import re
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import nn

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.atomic_folder import Saving, write
from mxcompile.checkpoint.atomic_folder import check_free as check_own
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import Card
from mxcompile.checkpoint.index import Index
from mxcompile.checkpoint.interop import foreign
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.checkpoint.stored_tensors import Names, take_apart
from mxcompile.errors import CheckpointError, UnknownNameError
from mxcompile.tensor.modules import is_pretrained

_OWN: Final = "mxcompile"
_SHARD_SIZE: Final = "5GB"
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NO_EFFECT: Final = frozenset({"safe_serialization", "save_peft_format", "save_original_format", "token"})


def save(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    max_shard_size: int | str = _SHARD_SIZE,
    format: str | None = None,
) -> None:
    """Write a quantized model to a folder, from which `load` (and transformers' `from_pretrained`) reads it.

    model: what `deploy` or `quantize_and_compile` returned, compiled or not; it is not changed.
    path: a new folder, one with a checkpoint that is to be replaced, or one without any model in it. Replacing happens
        at one moment: a save that is interrupted, even killed, leaves the old checkpoint or the new one.
    tokenizer, processor: written beside it by their own `save_pretrained`; a GGUF file has no place for them.
    max_shard_size: of a file of weights, in bytes or as "5GB".
    format: "mxcompile", which None means too; or for other programs "compressed-tensors", to a new folder, or "gguf",
        to a file, which a path that ends in .gguf means too. These do not hold everything: what they cannot is refused.

    Raises CheckpointError if there is nothing quantized, the module holds what a checkpoint cannot, or the folder
    holds something else.
    """
    largest = _bytes(max_shard_size)
    module: nn.Module = getattr(model, "_orig_mod", model)  # of a torch.compile(model)
    names, tensors = take_apart(module)
    if not names.weights:
        raise CheckpointError(
            f"{type(module).__name__} has no MX weights: quantize it first, this saves quantized models"
        )
    shards.check_dtypes(tensors.items())
    folder, others = Path(path), (tokenizer, processor)
    other = _other_format(format, folder)
    if other is not None:
        foreign.save(folder, other, module, names, largest, lambda to: _write_beside(module, to, names, others))
        return
    try:
        with Saving(folder) as saving:
            config = _write_beside(module, saving.stage, names, others)
            groups = shards.split(tensors, largest)
            files = [f"{saving.stem}-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
            written = {file: shards.write(saving.new(file), group) for file, group in zip(files, groups, strict=True)}
            index = f"{saving.stem}.safetensors.index.json"
            data = Index(names, written).to_json().encode()
            write(saving.new(index), data)
            kind = type(module).__name__
            saving.commit(Card(kind, Provenance.of(module), index, sha256(data), saving.staged(), config))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}): what was saved there before is whole") from error


def check_free(path: str | Path, format: str | None = None) -> None:
    """Raise CheckpointError if something is there that `save` to that path would not replace."""
    folder = Path(path)
    other = _other_format(format, folder)
    if other is None:
        check_own(folder)
    else:
        foreign.check_free(folder, other)


def _other_format(format: str | None, path: Path) -> str | None:
    """Another project's format, by its name or a file's; None for our own."""
    if format is None:
        return foreign.GGUF if path.suffix == ".gguf" else None
    if format not in (_OWN, *foreign.WRITTEN):
        raise UnknownNameError("checkpoint format", format, (_OWN, *foreign.WRITTEN))
    return None if format == _OWN else format


def adopt(model: nn.Module, provenance: Provenance | None) -> None:
    """Write on a quantized model what made it, and let its `save_pretrained` be ours if transformers gave it one."""
    if provenance is not None:
        provenance.write_on(model)
    if is_pretrained(model):
        setattr(model, "save_pretrained", partial(save_pretrained, model))  # noqa: B010 - typed as a tensor or module


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    max_shard_size: int | str = _SHARD_SIZE,
    **options: Any,
) -> None:
    """`save`, called as transformers calls it; options that it cannot honour are refused."""
    refused = sorted(name for name, value in options.items() if value and name not in _NO_EFFECT)
    if refused:
        raise CheckpointError(
            f"a model with MX weights is written to a folder as it is: save_pretrained cannot take {', '.join(refused)}"
        )
    if is_main_process:
        save(model, save_directory, max_shard_size=max_shard_size)


def _write_beside(module: nn.Module, stage: Path, names: Names, others: tuple[Any, ...]) -> dict[str, Any]:
    """Write what belongs to a model besides its weights; returns its configuration."""
    for other in others:
        if other is not None:
            other.save_pretrained(stage)
    if not is_pretrained(module):
        return {}
    from mxcompile.checkpoint import hf_models  # imports transformers

    hf_models.save_generation(module, stage)  # pyright: ignore[reportArgumentType]
    return hf_models.configuration(module, names)  # pyright: ignore[reportArgumentType]


def _bytes(size: int | str) -> int:
    match = _SIZE.fullmatch(f"{size}B" if isinstance(size, int) else size.strip())
    number = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if number < 1:
        raise CheckpointError(f"max_shard_size is {size!r}: give a number of bytes, or a text such as 5GB")
    return number
