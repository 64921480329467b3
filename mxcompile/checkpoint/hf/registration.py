"""Register the quantizer and our experts with transformers: at once if it is imported, else when it is. Mark models.

Importing transformers takes longer than importing mxcompile, and most uses of mxcompile do not need it. So
`import mxcompile` installs an import hook on the module that holds transformers' table of quantizers.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from mxcompile.checkpoint.config_json import METHOD
from mxcompile.checkpoint.hf.experts import register_experts, use_mx_experts
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.tensor.modules import is_pretrained

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer and the experts; calling it again has no effect."""
    if _TABLE in sys.modules:
        _register_in(sys.modules[_TABLE])
    elif not any(isinstance(finder, _RegistrationHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistrationHook())


def mark_quantized(model: nn.Module, provenance: Provenance | None) -> None:
    """Store the provenance on a quantized model; a transformers model is quantized for transformers too.

    It gets the quantizer that a loaded one has, which training loops ask, and our methods (`methods.py`).
    """
    if provenance is not None:
        provenance.write_on(model)
    if is_pretrained(model):
        from mxcompile.checkpoint.hf.quantizer import MXCompileConfig, MXCompileQuantizer  # imports transformers

        MXCompileQuantizer(MXCompileConfig()).attach(model)
    use_mx_experts(model)


class _RegistrationHook(MetaPathFinder):
    """Import hook: finds the table's module as Python does, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Executes the table's module, then registers our quantizer."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register_in(module)


def _register_in(table: ModuleType) -> None:
    from mxcompile.checkpoint.hf.quantizer import MXCompileConfig, MXCompileQuantizer

    if METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(METHOD)(MXCompileConfig)
        table.register_quantizer(METHOD)(MXCompileQuantizer)
        register_experts()  # a pickled model names them, and calls nothing of ours before it runs
