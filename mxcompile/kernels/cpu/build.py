"""Build the CPU kernels: mx_cpu.cpp -> one shared library per format, compiled on first use and cached.

mx_cpu_operator.cpp -> one library for the installed torch. A build takes one or two seconds. Libraries are stored in
the user's cache folder under a hash of the sources, the compiler with its version and options, the processor, and,
where it matters, the version of torch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock, Timeout

from mxcompile.atomic_files import atomic_file
from mxcompile.formats import MXFormat, why_no_kernel

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
"""The element type of each format in mx_cpu.cpp, in the order of `with_element` there."""
_OPTIONS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
if sys.platform == "linux":
    # Some compilers link libstdc++ statically; without this, torch's copy would replace half of its symbols.
    _OPTIONS.append("-Wl,--exclude-libs,ALL")
_LINEARS = ("mx_cpu.h", "mx_cpu_linears.h", "mx_cpu_threads.h")
_PARTS = ("elements", "rounding", "dot", "dot256", "dot512", "panels", "values")
_SECONDS = 120


class BuildError(Exception):
    """The library cannot be built or loaded; the message says why."""


@cache
def library(fmt: MXFormat) -> ctypes.CDLL:
    """The library of mx_cpu.cpp for a format. Raises BuildError; a failure is not cached."""
    if reason := why_no_kernel(fmt):
        raise BuildError(reason)
    options = ["-O3", *_machine_options(), f"-DMX_ELEMENT={ELEMENTS[fmt.name]}", f"-DMX_BLOCK={fmt.block_size}"]
    sources = ("mx_cpu.cpp", *_LINEARS, *(f"mx_cpu_{part}.h" for part in _PARTS))
    return _library(f"{fmt.name}-{fmt.block_size}", sources, options, _processor())


@cache
def experts_library() -> ctypes.CDLL:
    """The library of mx_cpu_experts.cpp. Raises BuildError; a failure is not cached."""
    sources = ("mx_cpu_experts.cpp", "mx_cpu.h", "mx_cpu_gate.h", "mx_cpu_values.h")
    return _library("experts", sources, ["-O3", *_machine_options()], _processor())


@cache
def recording_library() -> ctypes.CDLL:
    """The library of mx_cpu_recording.cpp. Raises BuildError; a failure is not cached."""
    return _library("recording", ("mx_cpu_recording.cpp", *_LINEARS), ["-O2", *_machine_options()], _processor())


@cache
def operator() -> ctypes.CDLL:
    """The library of mx_cpu_operator.cpp, which registers the operator. Raises BuildError; a failure is not cached."""
    return _library("operator", ("mx_cpu_operator.cpp", "mx_cpu.h"), _torch_options(), torch.__version__)


def _torch_options() -> list[str]:
    folder = Path(torch.__file__).parent
    return ["-O2", f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-ltorch_cpu"]


def why_not(fmt: MXFormat) -> str | None:
    """None if there is a library for the format, else the reason."""
    return _why_not(fmt)


@cache
def _why_not(fmt: MXFormat) -> str | None:
    try:
        library(fmt)
    except BuildError as error:
        return str(error)
    return None


def _library(title: str, sources: Sequence[str], options: Sequence[str], built_for: str) -> ctypes.CDLL:
    """Build, if not cached, and load the library of the first source, which includes the others."""
    command = [_compiler(), *_OPTIONS, str(_FOLDER / sources[0]), *options]
    texts = [(_FOLDER / source).read_text() for source in sources]
    fingerprint = (*texts, _version(command[0]), " ".join([*_OPTIONS, *options]), built_for)
    name = hashlib.sha256("\n".join(fingerprint).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("mxcompile", appauthor=False)) / "cpu"
    path = folder / f"{title}-{name}.so"
    try:
        if (loaded := _loaded(path)) is not None:
            return loaded
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=2 * _SECONDS):  # processes that start together build it once
            if (loaded := _loaded(path)) is not None:
                return loaded
            _build(command, path)
            return ctypes.CDLL(str(path))
    except Timeout as error:
        raise BuildError(f"another process has not built the CPU kernel {title} in {2 * _SECONDS} s") from error
    except OSError as error:
        raise BuildError(f"the CPU kernel {title} cannot be stored in {folder}: {error.strerror or error}") from error


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library, if it is there and intact."""
    if path.exists():
        with suppress(OSError):  # damaged, as by a power failure: built again
            return ctypes.CDLL(str(path))
    return None


def _build(command: list[str], path: Path) -> None:
    """Build the library, whole or not at all: this process may be killed."""
    with atomic_file(path, durable=True) as built:
        try:
            completed = subprocess.run(
                [*command, "-o", str(built)], capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} did not finish within {_SECONDS} s") from error
        if completed.returncode:
            lines = [line for line in completed.stderr.splitlines() if "error" in line] or ["no message"]
            raise BuildError(f"{command[0]} cannot build the CPU kernels: {lines[0]}")


def _compiler() -> str:
    if sys.platform == "win32":
        raise BuildError("the CPU kernels are not built on Windows")
    cxx = os.environ.get("CXX")
    for name in (cxx,) if cxx else ("g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError("there is no C++ compiler (g++ or clang++) to build the CPU kernels with")


def _machine_options() -> list[str]:
    if platform.machine() in ("arm64", "aarch64"):
        return ["-mcpu=native"]
    return ["-march=native", "-mprefer-vector-width=512"]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """The processor features that -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    lines = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return lines[0] + lines[-1] if lines else f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
