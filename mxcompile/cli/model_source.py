"""Load the model and tokenizer of a command: from a local path, a hub id, or SmolLM2 by default."""

from pathlib import Path
from typing import Any

from mxcompile.api import load
from mxcompile.checkpoint import is_foreign
from mxcompile.cli import smollm2
from mxcompile.errors import InputError


def load_model(source: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) from a local path or hub id; SmolLM2-135M for None or "smollm2"."""
    if source is None or source.lower() == "smollm2":
        return smollm2.load()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import

    try:
        if is_foreign(Path(source)):
            return load(source), AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{source} cannot be loaded ({reason}); use a hub id, or a folder with a causal language model and its "
            "tokenizer"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
