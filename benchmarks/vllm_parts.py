"""The parts of a vLLM wheel that serve dense models on a Hopper GPU, to carry to a machine without a network.

    pip download --no-deps --python-version 3.12 --only-binary :all: --platform manylinux_2_28_x86_64 vllm==0.26.0
    python benchmarks/vllm_parts.py vllm-0.26.0-cp38-abi3-manylinux_2_28_x86_64.whl parts --wheels
    for part in parts/*.tar.xz; do tar -xJf $part -C site; done                                     on that machine
    pip install --no-index --no-deps --target site parts/wheels/*.whl
    PYTHONPATH=site python -c "import vllm._C_stable_libtorch"
    PYTHONPATH=site python benchmarks/serving.py --out benchmarks/results/serving-h200.jsonl

0.26.0 is the last release that is built for torch 2.11, with CUDA 13. Its wheel has 290 MiB, of which these parts are
enough: the kernels of linears, norms and the cache (Marlin is among them), FlashAttention 3, and Python. Left out:
FlashAttention 2, which is for other GPUs, the kernels of experts, whose import vLLM survives, FlashMLA, QuTLASS,
DeepGEMM, the front end in Rust, C++ headers. `--moe` keeps the kernels of experts. With `--wheels`, 86 MiB in all.

`WHEELS` are the packages besides torch, transformers and what they bring that vLLM imports to run `LLM` and the OpenAI
server, found by importing it with everything else uninstalled. FlashInfer, tilelang, cutlass-dsl, quack and
humming-kernels are not among them, so set VLLM_USE_FLASHINFER_SAMPLER=0, as serving.py does.
"""

import argparse
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from zipfile import ZipFile

PARTS: Final = {
    "kernels": r"vllm/_C_stable_libtorch\.abi3\.so",
    "attention": r"vllm/(vllm_flash_attn/_vllm_fa3_C|cumem_allocator|spinloop|fs_io)[^/]*\.so",
    "python": r".*\.(py|json|jinja|js|css)|[^/]+\.dist-info/.*",
}
MOE: Final = {"experts": r"vllm/_moe_C_stable_libtorch\.abi3\.so"}
WHEELS: Final = (
    *("compressed-tensors==0.17.0", "apache-tvm-ffi==0.1.11", "xgrammar==0.2.9", "llguidance==1.7.6", "loguru"),
    *("cachetools", "cbor2", "msgspec", "partial-json-parser", "pybase64", "pyzmq", "pydantic==2.14.4"),
    *("pydantic-core==2.50.5", "annotated-types", "typing-inspection", "fastapi==0.136.3", "starlette"),
    *("openai==2.54.0", "jiter", "distro", "sniffio", "openai-harmony", "uvicorn", "watchfiles"),
    *("model-hosting-container-standards", "jmespath", "python-multipart", "email-validator", "dnspython"),
)
_TAGS: Final = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="a wheel of vLLM")
    parser.add_argument("folder", type=Path, help="where the parts are written")
    parser.add_argument("--moe", action="store_true", help="the kernels of experts, too")
    parser.add_argument("--wheels", action="store_true", help="download the other packages to FOLDER/wheels, too")
    parser.add_argument("--python-version", default="3.12", help="of that machine: %(default)s")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(arguments.wheel) as wheel:
        chosen = choose(wheel.namelist(), PARTS | (MOE if arguments.moe else {}))
        for part, names in chosen.items():
            path = write(wheel, names, arguments.folder / f"{part}.tar.xz")
            print(f"{path}: {len(names)} files, {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    if arguments.wheels:
        download(arguments.folder / "wheels", arguments.python_version)
    return 0


def choose(names: Iterable[str], parts: dict[str, str]) -> dict[str, list[str]]:
    """The files of each part. Exits if a part has none: then the wheel is another release's."""
    names = [name for name in names if not name.endswith("/")]
    chosen = {part: [name for name in names if re.fullmatch(pattern, name)] for part, pattern in parts.items()}
    if empty := [part for part, files in chosen.items() if not files]:
        sys.exit(f"the wheel has no files for {', '.join(empty)}: the parts are those of vLLM 0.26.0")
    return chosen


def write(wheel: ZipFile, names: Iterable[str], path: Path) -> Path:
    """The files of a wheel as a .tar.xz, with fixed times, so that equal parts are equal files."""
    with tarfile.open(path, "w:xz") as archive:
        for name in sorted(names):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = wheel.getinfo(name).file_size, 0o644
            with wheel.open(name) as file:
                archive.addfile(entry, file)
    return path


def download(folder: Path, version: str) -> None:
    """The packages of `WHEELS`, for that machine."""
    platforms = [word for tag in _TAGS for word in ("--platform", tag)]
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", version, *platforms, "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *WHEELS], check=True)


if __name__ == "__main__":
    sys.exit(main())
