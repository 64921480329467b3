from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

class ModelWeightParameter(nn.Parameter):
    def __init__(self, *, data: Tensor, output_dim: int, input_dim: int, weight_loader: Callable[..., Any]) -> None: ...

class RowvLLMParameter(nn.Parameter):
    def __init__(self, *, data: Tensor, input_dim: int, weight_loader: Callable[..., Any]) -> None: ...
