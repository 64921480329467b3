"""What made a quantized module: `deploy` writes it on the module, copies carry it, checkpoints state it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import nn

_ATTRIBUTE = "_mxcompile_provenance"


def installed_versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    own, theirs = version("mxcompile"), version("transformers")
    return {"mxcompile": own, "torch": str(torch.__version__), "transformers": theirs}


@dataclass(frozen=True)
class Provenance:
    """recipe: the passes that ran, in a pipeline's text form. versions: of packages, when they ran."""

    recipe: str
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def write_on(self, module: nn.Module) -> None:
        """Keep it on the module."""
        setattr(module, _ATTRIBUTE, self)

    @classmethod
    def of(cls, module: nn.Module) -> "Provenance | None":
        """What is written on the module; None if nothing is."""
        found = getattr(module, _ATTRIBUTE, None)
        return found if isinstance(found, cls) else None
