"""mx_cpu.cpp -> a library for one format, built with the machine's C++ compiler when it is first needed, and kept.

A library takes about a second to build. It lies in the user's cache folder under a name that says what it was made
from: the source, the compiler with its version and options, and the processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs
import torch

from mxcompile.formats import MXFormat, no_kernel

_SOURCE = Path(__file__).with_name("mx_cpu.cpp")
_INCLUDED = _SOURCE.with_name("mx_cpu_dot.h")
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
_OPTIONS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
_SECONDS = 120


class BuildError(Exception):
    """The library cannot be had; says why."""


@cache
def library(fmt: MXFormat) -> ctypes.CDLL:
    """The functions of mx_cpu.cpp for a format. Raises BuildError, each time again."""
    if reason := no_kernel(fmt):
        raise BuildError(reason)
    compiler = _compiler()
    command = [compiler, *_OPTIONS, *_tuning(), f"-DMX_ELEMENT={ELEMENTS[fmt.name]}", f"-DMX_BLOCK={fmt.block_size}"]
    made_from = (_SOURCE.read_text(), _INCLUDED.read_text(), _version(compiler), " ".join(command), _processor())
    name = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("mxcompile", appauthor=False)) / "cpu"
    path = folder / f"{fmt.name}-{fmt.block_size}-{name}.so"
    try:
        if not path.exists():
            _build(command, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the kernel for {fmt} cannot be kept in {folder}: {error.strerror or error}") from error


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


def _build(command: list[str], path: Path) -> None:
    """Build under a temporary name, then rename: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        try:
            done = subprocess.run(
                [*command, str(_SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=_SECONDS, check=False
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
