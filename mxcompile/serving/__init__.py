"""Serve saved models on vLLM: its plugin, which `pip install mxcompile` adds to an installed vLLM.

    vllm serve OUT/model        LLM("OUT/model")

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes. A folder or
hub id whose config.json says `"quant_method": "mxcompile"` is then loaded by our config (config.py) and layers
(linear.py, vocabulary.py), with the formats of weights and activations that were measured. Folders in the format of
compressed-tensors are vLLM's own; mxcompile offers kernels for them (stock_kernels.py).

vLLM is no dependency: only vLLM calls `register`. What does not need its types is in stored_model.py, shard_limits.py,
packed_linear.py and warm_up.py.
"""

from typing import Final

METHOD: Final = "mxcompile"


def register() -> None:
    """Add mxcompile's quantization method to vLLM; a second call changes nothing."""
    from vllm.model_executor.layers import quantization

    if METHOD not in quantization.QUANTIZATION_METHODS:
        from mxcompile.serving.config import MXCompileConfig
        from mxcompile.serving.stock_kernels import register_kernels

        quantization.register_quantization_config(METHOD)(MXCompileConfig)
        register_kernels()
