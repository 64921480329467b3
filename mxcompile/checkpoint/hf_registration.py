"""Telling transformers of the quantizer when it is imported, or now if it has been.

Importing transformers takes longer than importing mxcompile, which most of its uses do without. So `import mxcompile`
leaves a note: the module that holds transformers' table of quantizers is followed by an entry of ours.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from mxcompile.checkpoint.config_json import METHOD

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Do it; once is enough, more does no harm."""
    if _TABLE in sys.modules:
        _add(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Note) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Note())


class _Note(MetaPathFinder):
    """Finds the table as Python does, and has it filled in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Filled(spec.loader)
        return spec


class _Filled(Loader):
    """Executes the table's module, then adds ours."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add(module)


def _add(table: ModuleType) -> None:
    from mxcompile.checkpoint.hf_quantizer import MXCompileConfig, MXCompileQuantizer

    if METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(METHOD)(MXCompileConfig)
        table.register_quantizer(METHOD)(MXCompileQuantizer)
