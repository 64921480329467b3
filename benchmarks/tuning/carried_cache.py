"""Triton's cache of compiled kernels, filled on a machine without a GPU and carried to one with a GPU.

A compiled kernel depends on Triton's version, the target and the kernel. But its key in the cache has a hash of
Triton's shared library, which differs between Python versions, and its entry the absolute paths of its files. `use`
leaves out both, in this process; both machines call it. A cache packs well, without the intermediate code:

    find FOLDER \\( -name "*.cubin" -o -name "*.json" \\) | tar c -T - | xz > kernels.tar.xz
"""

# pyright: basic, reportAttributeAccessIssue=false
# Triton ships no types.

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import cache, driver, jit

MULTIPROCESSORS: Final = 132
"""Of an H100 or H200 (SXM), which candidates depend on."""


def use(folder: Path) -> None:
    """Keep compiled kernels in `folder`, with keys that depend on Triton only by its version."""
    triton.knobs.cache.dir = str(folder.resolve())
    replacement: Any = lambda: triton.__version__  # noqa: E731
    cache.triton_key = replacement
    replacement = _files_of_entry
    cache.FileCacheManager.get_group = replacement


def _files_of_entry(entry: Any, filename: str) -> dict[str, str] | None:
    """The files of a complete entry, which end with that of its group."""
    if not entry.has_file(f"__grp__{filename}"):
        return None
    names = [file.name for file in Path(entry.cache_dir).iterdir() if not file.name.startswith(("__grp__", "tmp."))]
    return {name: entry._make_path(name) for name in names}


class _Hopper:
    """What Triton asks the driver of a GPU before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only() -> None:
    """Where there is no GPU: launches with tensors of the CPU compile for Hopper, and do not run."""
    no_driver: Any = _Hopper()
    driver.set_active(no_driver)
    run = jit.JITFunction.run

    def compile_it(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        options |= {"INTERPRETED": False} if "INTERPRETED" in options else {}
        return run(self, *arguments, grid=grid, warmup=True, **options)

    replacement: Any = compile_it
    jit.JITFunction.run = replacement
    no_context: Any = lambda *_: contextlib.nullcontext()  # noqa: E731
    torch.cuda.device = torch.cuda.device_of = no_context
    properties: Any = lambda *_: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)  # noqa: E731
    torch.cuda.get_device_properties = properties
