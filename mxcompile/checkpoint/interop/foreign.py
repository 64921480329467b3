"""Recognize other projects' checkpoints by their format, and read and write them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.atomic_files import check_writable, real_path
from mxcompile.checkpoint.checked_json import read_json
from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.checkpoint.interop import build_model, compressed_tensors, gguf_model, gguf_tokenizer_reader, gpt_oss
from mxcompile.checkpoint.interop.files import check_new, new_folder, quantization_of, replace_file, write_tensors
from mxcompile.checkpoint.interop.gguf_writer import GGUFWriting
from mxcompile.checkpoint.stored_tensors import TensorNames
from mxcompile.errors import CheckpointError, warn
from mxcompile.formats import MXFormat

_READERS: Final = {compressed_tensors.METHOD: compressed_tensors.read, gpt_oss.METHOD: gpt_oss.read}
GGUF: Final = "gguf"
WRITABLE_FORMATS: Final = (compressed_tensors.METHOD, GGUF)
"""Formats of other projects that `save` can write."""


def is_foreign(path: Path) -> bool:
    """True if the path holds another project's checkpoint in a format that `load` can read."""
    return is_gguf(path) or str(quantization_of(path).get("quant_method")) in _READERS


def load(path: Path, model: nn.Module | None = None) -> nn.Module:
    """Load a checkpoint for which `is_foreign` is true, into `model` if given, else into a new transformers model.

    Raises CheckpointError if it is damaged or has weights that an MXWeight cannot represent; `model` is then unchanged.
    """
    if is_gguf(path):
        if model is not None:
            raise CheckpointError(f"{path} is a GGUF file, which uses other tensor names: load it without model=...")
        return gguf_model.load(path)
    config = read_json(path / CONFIG)[1]
    tensors = _READERS[quantization_of(path)["quant_method"]](path, config)
    return build_model.build(path, config, tensors) if model is None else build_model.fill(path, model, tensors)


def check_destination(path: Path, format: str) -> None:
    """Raise CheckpointError if `save` would refuse to replace what is there, OSError if it cannot write there."""
    if format != GGUF:
        check_new(path)
    elif path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file, such as {path / 'model.gguf'}")
    check_writable(real_path(path).parent, is_folder=True)


def check_model(format: str, module: nn.Module, weights: Iterable[MXFormat]) -> None:
    """Raise CheckpointError, before a model is quantized to these formats, if `save` could not write it then."""
    if format == GGUF:
        GGUFWriting(module, None, weights).check()


def save(
    path: Path,
    format: str,
    module: nn.Module,
    names: TensorNames,
    largest: int,
    auxiliary: Callable[[Path], Mapping[str, Any]],
    tokenizer: Any = None,
) -> None:
    """Write a model in one of `WRITABLE_FORMATS`.

    largest: bytes of a weight file. auxiliary: writes the auxiliary files to a folder and returns the model's config.
    tokenizer: of transformers, for a format that is a single file.
    Raises CheckpointError with all reasons, naming layers, if that format cannot hold the model; then nothing is
    written. Warns of what the other program will do otherwise than the model.
    """
    if format == GGUF:
        notes: list[str] = []
        writing = GGUFWriting(module, tokenizer)
        replace_file(path, lambda stage: notes.extend(writing.write(stage, names)))
        if notes:
            warn(f"{path}: {'; '.join(notes)}")
        return
    with new_folder(path) as stage:
        tensors = compressed_tensors.write(stage, module, names, auxiliary(stage))
        write_tensors(stage, tensors, largest)


def read_gguf_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a GGUF file, as one of transformers; None if the file holds none.

    Raises CheckpointError if mxcompile does not know how llama.cpp tokenizes with it.
    """
    return gguf_tokenizer_reader.load(Path(path))


@checked
def read_gguf(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file of any architecture, under llama.cpp's names: MXFP4 as MXWeights, the rest as float32.

    Raises CheckpointError if the file is damaged, InputError if the gguf package is missing.
    """
    return gguf_model.read(Path(path))


def is_gguf(path: Path) -> bool:
    """True if the path names a GGUF file."""
    return path.suffix == ".gguf" and not path.is_dir()
