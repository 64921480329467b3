"""Load the model and tokenizer of a command: from a local path, a hub id, or SmolLM2 by default."""

from pathlib import Path
from typing import Any

from mxcompile.api import load
from mxcompile.checkpoint import is_foreign, is_gguf, read_gguf_tokenizer
from mxcompile.cli import smollm2
from mxcompile.cli.console import messages
from mxcompile.errors import CheckpointError, InputError


def load_model(source: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) from a local path or hub id; SmolLM2-135M for None or "smollm2"."""
    if source is None or source.lower() == "smollm2":
        return smollm2.load()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import

    if is_gguf(Path(source)):
        return _load_gguf(Path(source))
    try:
        if is_foreign(Path(source)):
            return load(source), AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        reason = reason if Path(source).exists() else f"there is no such folder or file here; as a hub id: {reason}"
        raise InputError(
            f"{source} cannot be loaded ({reason}); use a hub id, a GGUF file, or a folder with a causal language "
            "model and its tokenizer"
        ) from error


def _load_gguf(path: Path) -> tuple[Any, Any]:
    model, tokenizer = load(path), read_gguf_tokenizer(path)
    if tokenizer is None:
        raise InputError(f"{path} holds no tokenizer: save the model again with mxcompile.save(..., tokenizer=...)")
    return model, tokenizer


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
