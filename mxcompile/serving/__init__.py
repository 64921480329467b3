"""Serve saved models on vLLM: its plugin, which `pip install mxcompile` adds to an installed vLLM.

    vllm serve OUT/model        LLM("OUT/model")

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes. A folder or
hub id whose config.json says `"quant_method": "mxcompile"` is then loaded by our config (config.py) and layers
(linear.py), with the formats of weights and activations that were measured.

vLLM is no dependency: only vLLM calls `register`. What does not need its types is in stored_model.py, shard_limits.py
and packed_linear.py.
"""

from typing import Final

METHOD: Final = "mxcompile"


def register() -> None:
    """Add mxcompile's quantization method to vLLM; a second call changes nothing."""
    from vllm.model_executor.layers import quantization

    if METHOD not in quantization.QUANTIZATION_METHODS:
        from mxcompile.serving.config import MXCompileConfig

        quantization.register_quantization_config(METHOD)(MXCompileConfig)
