class FusedMoEConfig:
    num_experts: int
    hidden_dim: int
    intermediate_size: int
    has_bias: bool
    tp_rank: int
    tp_size: int
