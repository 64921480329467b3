from typing import Any

from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
    def process_weights_after_loading(self, layer: Any) -> None: ...
