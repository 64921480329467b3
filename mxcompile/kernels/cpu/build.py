"""mx_cpu.cpp -> a library for one format, built with the machine's C++ compiler when it is first needed, and kept.

mx_cpu_operator.cpp -> a library for this torch. A library takes a second or two to build. It lies in the user's cache
folder under a name that says what it was made from: the sources, the compiler with its version and options, the
processor, and torch's version where it matters.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs
import torch

from mxcompile.formats import MXFormat, no_kernel

_FOLDER = Path(__file__).parent
ELEMENTS = {
    "mxint8": "Int8",
    "mxint6": "Int6",
    "mxint4": "Int4",
    "mxfp8_e4m3": "E4M3",
    "mxfp8_e5m2": "E5M2",
    "mxfp6_e3m2": "E3M2",
    "mxfp6_e2m3": "E2M3",
    "mxfp4": "E2M1",
}
"""A format's element type in mx_cpu.cpp, in the order of its `with_element`."""
_OPTIONS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
if sys.platform == "linux":
    # Some compilers link their own libstdc++ statically: then torch's, which is another, is not to replace half of it.
    _OPTIONS.append("-Wl,--exclude-libs,ALL")
_SECONDS = 120


class BuildError(Exception):
    """The library cannot be had; says why."""


@cache
def library(fmt: MXFormat) -> ctypes.CDLL:
    """The functions of mx_cpu.cpp for a format. Raises BuildError, each time again."""
    if reason := no_kernel(fmt):
        raise BuildError(reason)
    options = ["-O3", *_tuning(), f"-DMX_ELEMENT={ELEMENTS[fmt.name]}", f"-DMX_BLOCK={fmt.block_size}"]
    return _library(f"{fmt.name}-{fmt.block_size}", ("mx_cpu.cpp", "mx_cpu.h", "mx_cpu_dot.h"), options, _processor())


@cache
def operator() -> ctypes.CDLL:
    """The function of mx_cpu_operator.cpp; to load it registers the operator. Raises BuildError, each time again."""
    return _library("operator", ("mx_cpu_operator.cpp", "mx_cpu.h"), _for_torch(), torch.__version__)


def _for_torch() -> list[str]:
    folder = Path(torch.__file__).parent
    return ["-O2", f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-ltorch_cpu"]


def why_not(fmt: MXFormat) -> str | None:
    """None if there is a library for the format, or why there is none."""
    return _why_not(fmt)


@cache
def _why_not(fmt: MXFormat) -> str | None:
    try:
        library(fmt)
    except BuildError as error:
        return str(error)
    return None


def _library(title: str, sources: Sequence[str], options: Sequence[str], built_for: str) -> ctypes.CDLL:
    """The library of the first source, which includes the others."""
    command = [_compiler(), *_OPTIONS, str(_FOLDER / sources[0]), *options]
    texts = [(_FOLDER / source).read_text() for source in sources]
    made_from = (*texts, _version(command[0]), " ".join([*_OPTIONS, *options]), built_for)
    name = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("mxcompile", appauthor=False)) / "cpu"
    path = folder / f"{title}-{name}.so"
    try:
        if not path.exists():
            _build(command, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernel {title} cannot be kept in {folder}: {error.strerror or error}") from error


def _build(command: list[str], path: Path) -> None:
    """Build under a temporary name, then rename: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} did not finish within {_SECONDS} s") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise BuildError(f"{command[0]} cannot build the CPU kernels: {lines[0]}")
        made.replace(path)


def _compiler() -> str:
    if sys.platform == "win32":
        raise BuildError("the CPU kernels are not built on Windows")
    given = os.environ.get("CXX")
    for name in (given,) if given else ("g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise BuildError("there is no C++ compiler (g++ or clang++) to build the CPU kernels with")


def _tuning() -> list[str]:
    if platform.machine() in ("arm64", "aarch64"):
        return ["-mcpu=native"]
    return ["-march=native", "-mprefer-vector-width=512"]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return known[0] + known[-1] if known else f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
