from collections.abc import Callable
from typing import TypeVar

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

QUANTIZATION_METHODS: list[str]

T = TypeVar("T", bound=type[QuantizationConfig])

def register_quantization_config(quantization: str) -> Callable[[T], T]: ...
