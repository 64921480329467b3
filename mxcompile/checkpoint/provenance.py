"""The recipe and package versions that made a quantized module: kept on the module, its copies and its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import nn

from mxcompile.numerics.cache_format import CacheFormat

_ATTRIBUTE = "_mxcompile_provenance"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    own, theirs = version("mxcompile"), version("transformers")
    return {"mxcompile": own, "torch": str(torch.__version__), "transformers": theirs}


@dataclass(frozen=True)
class Provenance:
    """recipe: the passes that ran, in a pipeline's text form. versions: of the packages when they ran.

    cache: the format of the key/value cache that `generate` makes; None: transformers' own, in float.
    """

    recipe: str
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    cache: CacheFormat | None = None

    def write_on(self, module: nn.Module) -> None:
        """Store it on the module."""
        setattr(module, _ATTRIBUTE, self)

    @classmethod
    def of(cls, module: nn.Module) -> "Provenance | None":
        """The provenance stored on the module, None if there is none."""
        stored = getattr(module, _ATTRIBUTE, None)
        return stored if isinstance(stored, cls) else None

    @classmethod
    def remove_from(cls, module: nn.Module) -> None:
        """Forget what is stored on the module."""
        vars(module).pop(_ATTRIBUTE, None)
