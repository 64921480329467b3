"""mxcompile's quantization method in vLLM: which layers are MX, from a checkpoint's config.json and index."""

import dataclasses
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from mxcompile.errors import CheckpointError
from mxcompile.serving import METHOD
from mxcompile.serving.experts import experts_method
from mxcompile.serving.float_layers import decoding_mapper
from mxcompile.serving.linear import MXCompileLinearMethod
from mxcompile.serving.stored_model import StoredModel
from mxcompile.serving.vocabulary import MXCompileEmbeddingMethod, MXCompileHeadMethod


class MXCompileConfig(QuantizationConfig):
    """The layers of one checkpoint. `stored` is read when vLLM says where the model is."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        self.fields = fields
        self.stored: StoredModel | None = None
        self.asked: set[str] = set()

    def get_name(self) -> str:
        """The value of `quant_method`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations; on a GPU each layer refuses float16, with its name."""
        return [torch.bfloat16, torch.float32, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """80: the kernels of planar weights need Ampere's matmul instructions for bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file besides config.json, whose `quantization_config` vLLM finds by itself."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MXCompileConfig":
        """The method for a `quantization_config`."""
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read and check config.json and the index of the model, a folder or a hub id.

        vLLM before 0.32 gives no revision; that of a hub id is in transformers' config.
        """
        self.stored = StoredModel(model_name, revision or getattr(hf_config, "_commit_hash", None))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the layers of the checkpoint as vLLM renames the model's."""
        mapper = dataclasses.replace(hf_to_vllm_mapper, orig_to_new_stacked={})
        self._read().rename(lambda name: _mapped(mapper, name))

    def get_cache_scale_mapper(self) -> WeightsMapper:  # pyright: ignore[reportIncompatibleMethodOverride]
        """vLLM's names of the stored tensors. An ordinary method where vLLM has a static one: it asks the instance."""
        stored = self._read()
        left = stored.left_in_float(self.asked)
        names = super().get_cache_scale_mapper() | WeightsMapper(orig_to_new_regex=stored.patterns(left.values()))
        return decoding_mapper(names, left, stored.float_weight)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer runs: on packed weights, or as vLLM runs float layers.

        Raises CheckpointError, with the layer's name, for a quantized layer that vLLM cannot run as it was measured.
        """
        if isinstance(layer, RoutedExperts):
            self.asked.add(prefix)
            return experts_method(layer, prefix, self._read())
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = self.parts(prefix)
        self.asked.update(parts)
        layout = self._read().layout(prefix, parts)
        if layout is None:
            return UnquantizedLinearMethod()
        return MXCompileLinearMethod(prefix, parts, layout, self._read())

    def _vocabulary_method(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        """How a head or an embedding runs; None as vLLM runs float ones. Some embeddings have no prefix."""
        is_head, stored = isinstance(layer, ParallelLMHead), self._read()
        table, head = stored.tied() or (prefix, prefix)
        if not is_head and prefix in ("", table):
            prefix = head
        self.asked.update({prefix} if is_head else {table, prefix})
        layout = stored.layout_of(prefix)
        if layout is None:
            return None
        return (MXCompileHeadMethod if is_head else MXCompileEmbeddingMethod)(prefix, [prefix], layout, stored)

    def parts(self, prefix: str) -> list[str]:
        """The layers of the checkpoint of which vLLM makes one: `...qkv_proj` -> `...q_proj`, `...k_proj`, `...`."""
        path, dot, leaf = prefix.rpartition(".")
        return [f"{path}{dot}{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]

    def _read(self) -> StoredModel:
        if self.stored is None:
            raise CheckpointError("vLLM has not said which model it loads: is its version older than 0.26?")
        return self.stored


def _mapped(mapper: WeightsMapper, name: str) -> str | None:
    """vLLM's name of a tensor, None for one that it skips."""
    return next(iter(mapper.apply_list([name])), None)
