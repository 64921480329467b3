"""Write a model with MXFP4 weights as a GGUF file that llama.cpp opens and runs.

    model.layers.0.mlp.up_proj.weight (MXWeight, mxfp4) -> blk.0.ffn_up.weight (MXFP4), the same bytes
    model.layers.0.mlp.experts.gate_up_proj (MXWeight) -> blk.0.ffn_gate_exps.weight, blk.0.ffn_up_exps.weight
    other matrices, such as the embedding -> F16;  vectors, such as norms, biases and routers -> F32

These are the types that llama.cpp's own converter writes. A matrix with values that F16 cannot hold becomes F32.
Tensors are encoded one at a time, while they are written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.element_layouts import check_scales
from mxcompile.checkpoint.interop.fused_experts import FusedTensor, fused_tensors
from mxcompile.checkpoint.interop.gguf_architectures import (
    architecture_of,
    gguf_names,
    permuted,
    settings,
    unsupported_settings,
    written_classes,
)
from mxcompile.checkpoint.interop.gguf_experts import ROUTERS, lookups
from mxcompile.checkpoint.interop.gguf_file import package
from mxcompile.checkpoint.interop.gguf_tokenizer import TokenizerEntries
from mxcompile.checkpoint.stored_tensors import TensorNames
from mxcompile.errors import CheckpointError
from mxcompile.formats import MXFP4, MXFormat
from mxcompile.tensor.weight import MXWeight

_FILE_TYPE: Final = 38  # LLAMA_FTYPE_MOSTLY_MXFP4_MOE of llama.h
_QUANTIZATION_VERSION: Final = 2  # GGML_QNT_VERSION of ggml.h
_LARGEST_F16: Final = 65504.0
_LISTED: Final = 3


@dataclass(frozen=True)
class _Part:
    """A tensor of the file. name, value: the model's tensor that it is, or of whose experts it is a projection."""

    stored_name: str
    name: str
    value: Tensor
    projection: str | None
    fused: FusedTensor | None


class GGUFWriting:
    """A model to write. tokenizer: of transformers, or None. weights: formats to which it will yet be quantized.

    reasons: all that keeps it from being written; more come to light when its weights are looked at.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, weights: Iterable[MXFormat] = ()) -> None:
        self.module = module
        self.architecture = architecture_of(module)
        self.reasons: list[str] = []
        if self.architecture is None:
            self.reasons.append(
                f"mxcompile writes {written_classes()} for llama.cpp; save others to a folder, or with "
                'format="compressed-tensors"'
            )
        else:
            self.config: Any = module.config
            unsupported = unsupported_settings(self.config, self.architecture)
            self.reasons += [
                f"this {self.config.model_type} has {what}, which mxcompile cannot write for llama.cpp"
                for what in unsupported
            ]
        self.reasons += [
            f"GGUF cannot hold {_unsupported_format(w)}" for w in sorted(map(str, weights)) if w != str(MXFP4)
        ]
        self.tokenizer = TokenizerEntries(tokenizer, getattr(getattr(module, "config", None), "vocab_size", 0))

    def check(self) -> None:
        """Raise a CheckpointError with all reasons, if there are any."""
        if self.reasons:
            listed = self.reasons[0] if len(self.reasons) == 1 else "".join(f"\n- {reason}" for reason in self.reasons)
            raise CheckpointError(f"{type(self.module).__name__} cannot be written as GGUF: {listed}")

    def write(self, path: Path, names: TensorNames) -> list[str]:
        """Write the file; returns what llama.cpp will do otherwise than the model, in sentences.

        Raises CheckpointError if GGUF cannot represent the model.
        """
        state = {
            name: value.to_row_major() if isinstance(value, MXWeight) else value
            for name, value in self.module.state_dict(keep_vars=True).items()
            if isinstance(value, MXWeight) or name not in names.aliases
        }
        self.reasons += _weight_reasons(state, fused_tensors(self.module))
        parts = self._parts(state)
        self.check()
        self._write(path, parts)
        return self._notes(state)

    def _parts(self, state: Mapping[str, Tensor]) -> list[_Part]:
        """What is to be stored of each tensor; adds to the reasons if something has no name."""
        if self.architecture is None:
            return []
        fused = fused_tensors(self.module)
        parts = {
            lookup: (value, name, projection)
            for name, value in state.items()
            for lookup, projection in lookups(name, fused).items()
        }
        stored_names = gguf_names(self.architecture, self.config.num_hidden_layers, parts)
        unnamed = [name for name, stored_name in stored_names.items() if stored_name is None]
        if unnamed:
            self.reasons.append(f"llama.cpp's {self.architecture} has no name for {_listed(unnamed)}")
        return [
            _Part(str(stored_names[lookup]), name, value, projection, fused.get(name))
            for lookup, (value, name, projection) in parts.items()
        ]

    def _write(self, path: Path, parts: list[_Part]) -> None:
        gguf = package()
        writer: Any = gguf.GGUFWriter(path, self.architecture)
        try:
            self._add_metadata(writer)
            for part in parts:
                value = self._value(part)
                shape, dtype = _encoding(part.stored_name, value)
                size = int(np.prod(shape)) * dtype.itemsize
                raw = gguf.GGMLQuantizationType.MXFP4 if dtype == np.uint8 else None
                writer.add_tensor_info(part.stored_name, shape, dtype, size, raw_dtype=raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for part in parts:
                writer.write_tensor_data(_encoded(part.stored_name, self._value(part)))
        finally:
            writer.close()

    def _add_metadata(self, writer: Any) -> None:
        source = Path(str(getattr(self.config, "_name_or_path", "") or "")).name
        writer.add_type("model")
        writer.add_name(source or type(self.module).__name__)
        writer.add_file_type(_FILE_TYPE)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        for key, value in settings(self.config, str(self.architecture)).items():
            add = {float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_uint32)
            add(key, value)
        self.tokenizer.add_to(writer, self._model_ids())

    def _model_ids(self) -> dict[str, Any]:
        """Ids of special tokens that the model itself uses: its generation config's, else its configuration's."""
        sources = (self.config, getattr(self.module, "generation_config", None))
        ids: dict[str, Any] = {}
        for source in sources:
            stated = {key: value for key, value in vars(source).items() if key.endswith("_token_id")} if source else {}
            ids |= {key: value for key, value in stated.items() if value is not None}
        return ids

    def _value(self, part: _Part) -> Tensor:
        """What is stored, in the order of rows that llama.cpp has."""
        if part.fused is not None:
            return part.fused.split(part.value)[str(part.projection)]
        heads = {key: getattr(self.config, key) for key in ("num_attention_heads", "num_key_value_heads")}
        return permuted(part.name, part.value, heads, str(self.architecture), from_gguf=False)

    def _notes(self, state: Mapping[str, Tensor]) -> list[str]:
        rounded = [v.layout_.activation for v in state.values() if isinstance(v, MXWeight) and v.layout_.activation]
        notes = list(self.tokenizer.sentences())
        if rounded:
            formats = ", ".join(sorted(set(rounded)))
            notes.append(
                f"it does not say that inputs of {len(rounded)} layers are rounded to {formats}: llama.cpp rounds them "
                "to 8-bit integers, mxcompile.load leaves them float"
            )
        return notes


def _encoding(stored_name: str, value: Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of what `_encoded` returns."""
    if isinstance(value, MXWeight):
        return (*value.scales.shape[:-1], value.scales.shape[-1] * (MXFP4.block_bytes + 1)), np.dtype(np.uint8)
    is_vector = value.dim() < 2 or stored_name.endswith((".bias", *ROUTERS))
    fits = not is_vector and bool((value.detach().abs() <= _LARGEST_F16).all())
    return tuple(value.shape), np.dtype(np.float16 if fits else np.float32)


def _encoded(stored_name: str, value: Tensor) -> Any:
    """A tensor as the GGUF writer takes it: MXFP4 as bytes `[..., out, in/32 * 17]`, others as float16 or float32."""
    if not isinstance(value, MXWeight):
        dtype = torch.float16 if _encoding(stored_name, value)[1] == np.float16 else torch.float32
        return value.detach().to("cpu", dtype).contiguous().numpy()
    check_scales(stored_name, value.scales)
    blocks = value.elements.unflatten(-1, (-1, MXFP4.block_bytes))
    return torch.cat([value.scales[..., None], blocks], dim=-1).flatten(-2).cpu().contiguous().numpy()


def _weight_reasons(state: Mapping[str, Tensor], fused: Mapping[str, FusedTensor]) -> list[str]:
    """What GGUF cannot hold of the MX weights, each with the names of those that it applies to."""
    names: dict[str, list[str]] = {}
    for name, value in state.items():
        if not isinstance(value, MXWeight):
            continue
        layout, is_turned = value.layout_, name in fused and fused[name].transposed
        reasons = {
            _unsupported_format(layout.format): layout.format != str(MXFP4),
            "an input that is multiplied by a vector (use awq-fold{multiply=false})": layout.multiplier,
            "an input that is rotated (use a recipe without rotate)": layout.rotation,
            "rows that are not a multiple of 32 values (skip them with exclude)": layout.size % 32,
            "a weight [in, out], the transpose of an nn.Linear's (skip it with exclude)": layout.transposed
            != is_turned,
        }
        for what, applies in reasons.items():
            if applies:
                names.setdefault(what, []).append(name)
    return [
        f"{_listed(which)}: GGUF cannot hold {what}; mxcompile.save to a folder saves it unchanged"
        for what, which in names.items()
    ]


def _unsupported_format(name: str) -> str:
    return f"{name} weights (quantize to {MXFP4} in blocks of 32: recipe w4a16-mxfp or w4a16-mxfp-quick)"


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
