"""Load the model and tokenizer of a command: from a local path, a hub id, or SmolLM2 by default."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxcompile.api import load
from mxcompile.checkpoint import is_foreign, is_gguf, read_gguf_tokenizer
from mxcompile.cli import smollm2
from mxcompile.cli.console import messages
from mxcompile.errors import CheckpointError, InputError, MXCompileError


def load_model(source: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) from a local path or hub id; SmolLM2-135M for None or "smollm2"."""
    if source is None or source.lower() == "smollm2":
        return smollm2.load()
    model = load_weights(source)
    if is_gguf(Path(source)):
        if (tokenizer := read_gguf_tokenizer(Path(source))) is None:
            raise InputError(
                f"{source} holds no tokenizer: save the model again with mxcompile.save(..., tokenizer=...)"
            )
        return model, tokenizer
    from transformers import AutoTokenizer  # slow to import

    with _explained(source):
        return model, AutoTokenizer.from_pretrained(source)


def load_weights(source: str | None) -> Any:
    """The model of `load_model`, whether or not a tokenizer is beside it."""
    if source is None or source.lower() == "smollm2":
        return smollm2.load()[0]
    if is_gguf(Path(source)):
        return load(Path(source))
    from transformers import AutoModelForCausalLM  # slow to import

    with _explained(source):
        return load(source) if is_foreign(Path(source)) else AutoModelForCausalLM.from_pretrained(source)


@contextmanager
def _explained(source: str) -> Generator[None]:
    """Raise InputError for what transformers raises: of a damaged file, a KeyError, a SafetensorError, anything."""
    try:
        yield
    except MXCompileError:
        raise
    except Exception as error:
        kind = type(error).__name__
        reason = next(iter(str(error).strip().splitlines()), kind)
        reason = reason if isinstance(error, OSError | ValueError | ImportError) else f"{kind}: {reason}"
        reason = reason if Path(source).exists() else f"there is no such folder or file here; as a hub id: {reason}"
        raise InputError(
            f"{source} cannot be loaded ({reason}); use a hub id, a GGUF file, or a folder with a causal language "
            "model and its tokenizer"
        ) from error


def load_tokenizer(source: Path) -> Any:
    """The tokenizer in a folder or a GGUF file, or None; prints why one in a GGUF file cannot be read."""
    if is_gguf(source):
        try:
            return read_gguf_tokenizer(source)
        except CheckpointError as error:
            messages().print(f"without its tokenizer: {error}", markup=False)
            return None
    if not (source / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)
