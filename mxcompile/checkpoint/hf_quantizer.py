"""The quantizer through which transformers loads what `mxcompile.save` wrote.

`from_pretrained` finds elements of MX weights under the parameters' own names, as bytes of another shape, and is told
that this is right; afterwards each weight takes its place, and so does what transformers does not read (buffers outside
of the state dict). This file is imported while transformers is: it may import nothing that builds models.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxcompile.checkpoint.config_json import METHOD
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.save import adopt
from mxcompile.checkpoint.stored_tensors import check_fits
from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.tensor.modules import own_tensors, place_all
from mxcompile.tensor.weight import MXWeight

_PARTS: Final = r"\.(scales|multiplier)$"  # of MX weights, see `Packing.parts`


class MXCompileConfig(QuantizationConfigMixin):
    """`quantization_config` of a `config.json`, as it is there. verify: False skips checksums."""

    def __init__(self, quant_method: str = METHOD, verify: bool = True, **fields: Any) -> None:
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue] - transformers has an enum of its own
        self.verify = verify
        self.__dict__.update(fields)


class MXCompileQuantizer(HfQuantizer):
    """Reads the checkpoint before transformers does, and puts the weights in place after it has."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be: quantizing while loading, weights left on the disk."""
        devices = kwargs.get("device_map")
        if not self.pre_quantized:
            raise CheckpointError(
                "mxcompile does not quantize while loading: load, then mxcompile.quantize_and_compile"
            )
        if isinstance(devices, dict) and "disk" in cast(dict[str, Any], devices).values():
            raise CheckpointError("MX weights cannot be left on the disk: leave it out of the device_map")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember it; any will do."""
        self.dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """None: a checkpoint has the module's own names."""
        return []

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether what is stored under a name has another shape than the parameter."""
        return param_name in self.checkpoint.names.weights

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes a value."""
        packing = self.checkpoint.names.weights.get(param_name)
        return param.element_size() if packing is None else parse_format(packing.layout.format).bits_per_value / 8

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Check all of the checkpoint before any of it is loaded."""
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("give from_pretrained a folder or a hub id, not a state dict")
        self.checkpoint = Checkpoint(Path(files[0]).parent, verify=getattr(self.quantization_config, "verify", True))
        saved = self.checkpoint.card.module
        if type(model).__name__ != saved:
            raise CheckpointError(f"{self.checkpoint.folder} holds a {saved}, not a {type(model).__name__}: load that")
        self.tensors = self.checkpoint.tensors()
        check_fits(model, self.checkpoint.names, self.tensors)
        extra = {_PARTS, *(f"^{re.escape(name)}$" for name in self.checkpoint.names.temporary)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *extra}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Put tensors in their places; those that transformers has cast to another dtype, as asked, stay so."""
        place_all(model, self._moved({name: tensor.device for name, tensor in own_tensors(model).items()}))
        del self.tensors
        adopt(model.requires_grad_(False), self.checkpoint.card.provenance)
        return model

    def _moved(self, devices: dict[str, torch.device]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that transformers has not loaded as they were saved, where it has put what it has."""
        checkpoint = self.checkpoint
        as_saved = str(self.dtype).removeprefix("torch.") == checkpoint.card.config.get("dtype")
        moved: dict[int, torch.Tensor] = {}
        for name, value in self.tensors.items():
            is_weight = isinstance(value, MXWeight)
            if name in devices and (as_saved or is_weight or name in checkpoint.names.temporary):
                dtype = self.dtype if is_weight and not as_saved else value.dtype
                yield name, moved.setdefault(id(value), value.to(devices[name], dtype))

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - theirs is untyped
        """By the `save_pretrained` that the model gets."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - likewise
        """Never."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Always."""
        return True
