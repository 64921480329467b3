"""The `HfQuantizer` with which transformers loads what `mxcompile.save` wrote.

`from_pretrained` finds the elements of MX weights under the parameters' own names, as bytes of another shape; the
quantizer declares these quantized, so that it accepts them. Afterwards the MX weights are put in place, and with them
what transformers does not read (non-persistent buffers). This file is imported while transformers is being imported, so
it must not import anything that builds models.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxcompile.checkpoint.config_json import METHOD
from mxcompile.checkpoint.hf.experts import use_mx_experts
from mxcompile.checkpoint.hf.methods import dequantize, replace_methods
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import check_fits
from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.tensor.dtypes import torch_name
from mxcompile.tensor.modules import named_tensors, set_tensors
from mxcompile.tensor.weight import MXWeight

_COMPONENTS: Final = r"\.(scales|multiplier)$"  # of MX weights, see `WeightPacking.parts`


class MXCompileConfig(QuantizationConfigMixin):
    """The `quantization_config` of a `config.json`, unchanged. verify: False skips checksums."""

    def __init__(self, quant_method: str = METHOD, verify: bool = True, **fields: Any) -> None:
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue] - transformers has an enum of its own
        self.verify = verify
        self.__dict__.update(fields)


class MXCompileQuantizer(HfQuantizer):
    """Checks the whole checkpoint before transformers reads it, and puts the MX weights in place afterwards."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize while loading, and to offload weights to disk."""
        devices = kwargs.get("device_map")
        if not self.pre_quantized:
            raise CheckpointError(
                "mxcompile does not quantize while loading: load the model, then call mxcompile.quantize_and_compile"
            )
        if isinstance(devices, dict) and "disk" in cast(dict[str, Any], devices).values():
            raise CheckpointError('MX weights cannot be offloaded to disk: leave "disk" out of the device_map')

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any dtype is supported; it is remembered for the MX weights."""
        self.dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """No conversions: the checkpoint uses the module's own names."""
        return []

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for an MX weight: its elements are stored in another shape than the parameter's."""
        return param_name in self.checkpoint.names.weights

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per value."""
        packing = self.checkpoint.names.weights.get(param_name)
        return param.element_size() if packing is None else parse_format(packing.layout.format).bits_per_value / 8

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Check all of the checkpoint before any of it is loaded."""
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("from_pretrained needs a folder or a hub id here, not a state dict")
        self.checkpoint = Checkpoint(Path(files[0]).parent, verify=getattr(self.quantization_config, "verify", True))
        if {Path(file).name for file in files} != set(self.checkpoint.index.shards):
            raise CheckpointError(f"{self.checkpoint.folder} was replaced while it was being read: load it again")
        saved = self.checkpoint.config.class_name
        if type(model).__name__ != saved:
            raise CheckpointError(
                f"{self.checkpoint.folder} holds a {saved}, not a {type(model).__name__}: load it with {saved}"
            )
        self.tensors = self.checkpoint.tensors()
        check_fits(model, self.checkpoint.names, self.tensors)
        extra = {_COMPONENTS, *(f"^{re.escape(name)}$" for name in self.checkpoint.names.non_persistent)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *extra}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Put the MX weights and non-persistent buffers in place; what transformers has cast on request stays cast."""
        with _without_offloading(model):
            set_tensors(model, self._moved({name: tensor.device for name, tensor in named_tensors(model).items()}))
        del self.tensors
        provenance = self.checkpoint.config.provenance
        if provenance is not None:
            provenance.write_on(model)
        replace_methods(model.requires_grad_(False))
        use_mx_experts(model, keep_chosen=True)
        return model

    def attach(self, model: Any) -> None:
        """Make a model that transformers has not loaded through a quantizer what it makes of one that it has."""
        model.hf_quantizer, model.is_quantized, model.quantization_method = self, True, METHOD
        replace_methods(model)

    def _moved(self, devices: dict[str, torch.device]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that transformers has not loaded as they were saved, on the devices it has chosen."""
        checkpoint = self.checkpoint
        as_saved = torch_name(self.dtype) == checkpoint.config.model_config.get("dtype")
        moved: dict[int, torch.Tensor] = {}
        for name, value in self.tensors.items():
            is_weight = isinstance(value, MXWeight)
            if name in devices and (as_saved or is_weight or name in checkpoint.names.non_persistent):
                dtype = self.dtype if is_weight and not as_saved else value.dtype
                yield name, moved.setdefault(id(value), value.to(devices[name], dtype))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `HfQuantizer.dequantize` calls, for whoever asks the quantizer and not the model."""
        return dequantize(model, dtype)

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - theirs is untyped
        """True: `replace_methods` replaces the model's `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - likewise
        """True: adapters are trained, through MX weights that stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: `torch.compile` supports MX weights."""
        return True


@contextmanager
def _without_offloading(model: Any) -> Generator[None]:
    """Take back what accelerate keeps in host memory for a GPU, and give it what is there afterwards."""
    device_map: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if "cpu" not in device_map.values() or set(device_map.values()) == {"cpu"}:
        yield
        return
    from accelerate import dispatch_model  # pyright: ignore[reportMissingTypeStubs]
    from accelerate.hooks import remove_hook_from_submodules  # pyright: ignore[reportMissingTypeStubs]

    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    with_buffers = any(getattr(hook, "offload_buffers", False) for hook in hooks)
    remove_hook_from_submodules(model)
    yield
    skipped = model._skip_keys_device_placement
    dispatch_model(model, device_map, offload_buffers=with_buffers, skip_keys=skipped)
