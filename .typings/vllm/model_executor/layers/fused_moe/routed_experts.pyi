from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

class RoutedExperts(nn.Module):
    layer_name: str
    top_k: int
    moe_config: FusedMoEConfig
    activation: MoEActivation
    apply_router_weight_on_input: bool
    @property
    def expert_map(self) -> Tensor | None: ...
