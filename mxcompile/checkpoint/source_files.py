"""A model in files, read tensor by tensor: under the names, in the shapes and dtypes that it has once it is loaded.

    source = SourceFiles("meta-llama/Llama-3.1-8B")
    source.model                                              # the module, its parameters on the meta device
    source.tensor("model.layers.0.mlp.experts.gate_up_proj")  # put together from the files, on the CPU

transformers says how stored tensors become those of the model (hf/source.py). No more than one of them is in memory,
with the parts that it is made of. Files that are quantized already are decoded (interop/quantized_sources.py).
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.checked_json import read_json
from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.checkpoint.hub import find_folder
from mxcompile.checkpoint.interop.quantized_sources import decoded
from mxcompile.checkpoint.stored_files import StoredTensor, stored_tensors
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight


class SourceFiles:
    """The tensors of a model in a folder, or on the Hugging Face hub (`owner/name`).

    folder: the folder. config: its `config.json`, empty without one. stored: the tensors of the files by their stored
    names. model: the module as `from_pretrained` returns it, with the tensors of the files on the meta device (buffers
    that it computes have their values); None if its class is not one of transformers, which is then not needed: the
    tensors have their stored names. unused: stored tensors that the model has no place for.

    Raises CheckpointError, naming the file, if one is missing, truncated or damaged, if the files do not hold a tensor
    that the model needs, or hold it in another shape.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = find_folder(source)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder with a model")
        path = self.folder / CONFIG
        self.config: dict[str, Any] = read_json(path)[1] if path.is_file() else {}
        self.stored: Mapping[str, StoredTensor] = decoded(self.folder, self.config, stored_tensors(self.folder))
        self.model: nn.Module | None = None
        self.unused: tuple[str, ...] = ()
        self._assemblies: dict[str, Any] = {}
        self._build()

    @property
    def notes(self) -> list[str]:
        """How tensors are stored that are decoded when they are read, and how many of each."""
        counts = Counter(tensor.note for tensor in self.stored.values() if tensor.note)
        return [f"{count} tensors are {note} and are decoded" for note, count in counts.items()]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors that come from the files, in the order of the module."""
        if self.model is None:
            return tuple(self.stored)
        return tuple(name for name, tensor in named_tensors(self.model).items() if tensor.is_meta)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Name -> the first name of the same tensor, for every other name of a tied one."""
        first: dict[int, str] = {}
        own = {} if self.model is None else named_tensors(self.model)
        return {name: first[id(value)] for name, value in own.items() if first.setdefault(id(value), name) != name}

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self._own(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._own(name).dtype

    def parts(self, name: str) -> list[str]:
        """The stored names of what a tensor is made of."""
        if self.model is None:
            return [name]
        return [part for part, _ in self._assemblies[self._source(name)].sources]

    def file(self, name: str) -> Path:
        """The file that holds a tensor, or the first part of it."""
        return self.stored[self.parts(name)[0]].file

    def stored_bytes(self, name: str) -> int:
        """The bytes of a tensor in the files; if other tensors are made of the same parts, its own share of them."""
        parts = self.parts(name)
        sharing = 1 if self.model is None else self._sharing[self._source(name)]
        return sum(self.stored[part].stored_bytes for part in parts) // sharing

    @cached_property
    def _sharing(self) -> dict[str, int]:
        """For each tensor, how many are made of the same parts."""
        counts = Counter(map(id, self._assemblies.values()))
        return {name: counts[id(assembly)] for name, assembly in self._assemblies.items()}

    def tensor(self, name: str) -> Tensor:
        """The values of a tensor, on the CPU: memory-mapped if the file has them as they are. Do not write to it.

        Raises CheckpointError, naming the file, if it cannot be read (any more).
        """
        dtype = self.dtype(name)
        if self.model is None:
            return self.stored[name].read()
        source = self._source(name)

        def read(part: str) -> Tensor:
            return self.stored[part].read().to(dtype)

        return self._assemblies[source].make(read)[source]

    def place(self, name: str) -> tuple[Path, int] | None:
        """The file, and the byte in it from which on a tensor's values lie; None if no file has them as they are."""
        parts = self.parts(name)
        stored = self.stored[parts[0]]
        is_stored = self.model is None or self._assemblies[self._source(name)].is_renaming
        if not is_stored or len(parts) > 1 or stored.offset is None or stored.dtype != self.dtype(name):
            return None
        return stored.file, stored.offset

    def packed(self, name: str) -> MXWeight | None:
        """A weight that is stored in an MX format, as it is stored; None for any other tensor."""
        parts = self.parts(name)
        read = self.stored[parts[0]].packed if len(parts) == 1 else None
        return None if read is None or self.shape(name) != self.stored[parts[0]].shape else read()

    def _own(self, name: str) -> Any:
        """What has the tensor's shape and dtype."""
        if self.model is None:
            return self.stored[name]
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def _source(self, name: str) -> str:
        """The name of the same tensor that the files hold: another one than the first may be stored."""
        if name in self._assemblies:
            return name
        first = self.aliases.get(name, name)
        same = (first, *(other for other, of in self.aliases.items() if of == first))
        return next(other for other in same if other in self._assemblies)

    def _build(self) -> None:
        from mxcompile.checkpoint.hf import source  # imports transformers

        kind = source.model_class(self.folder, self.config)
        if kind is None:
            return
        config = source.read_config(self.folder, kind)
        empty = source.empty_model(self.folder, config, kind)
        self._assemblies, unused = source.assemblies(empty, self.stored)
        self.unused = tuple(unused)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else self._first_float()
        stated = source.stated_values(empty, self._assemblies, dtype, self._differ)
        self._check_complete(empty)
        self.model = source.model_without_values(self.folder, config, kind, dtype, stated)

    def _first_float(self) -> torch.dtype:
        """The dtype that `from_pretrained` takes for a model whose config states none."""
        return next((each.dtype for each in self.stored.values() if each.dtype.is_floating_point), torch.float32)

    def _differ(self, one: str, other: str) -> bool:
        """Whether two tensors that the files hold, and a config calls tied, have different values."""

        def read(part: str) -> Tensor:
            return self.stored[part].read()

        values: list[Tensor] = [self._assemblies[name].make(read)[name] for name in (one, other)]
        return values[0].shape != values[1].shape or not torch.equal(*values)

    def _check_complete(self, empty: Any) -> None:
        """Raise CheckpointError if a parameter would be left to chance."""
        tied: dict[str, str] = getattr(empty, "all_tied_weights_keys", None) or {}
        stored = {tied.get(name, name) for name in self._assemblies}
        parameters = dict(empty.named_parameters(remove_duplicate=False))
        missing = [name for name in parameters if tied.get(name, name) not in stored]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder} does not hold {missing[0]}{more}, which a {type(empty).__name__} needs: its "
                f"{CONFIG} names another class than the files were written from"
            )
