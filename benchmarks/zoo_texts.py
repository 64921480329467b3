"""Models of texts for the zoo, beside those of `architectures.py`: by kind, and encoder-decoders."""

from collections.abc import Callable
from typing import Any, Final

import zoo_modules
from architectures import HIDDEN, VOCABULARY, auto, causal, seq2seq
from torch import nn

_HYBRID: Final[dict[str, Any]] = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 4}
}
_GATED_DELTA: Final[dict[str, Any]] = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
TEXTS: Final[dict[str, dict[str, Callable[[], nn.Module]]]] = {
    "decoder": {
        "xglm": causal("xglm", attention_heads=4),
        "ministral": causal("ministral"),
        "gemma3n": causal(
            "gemma3n_text",
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=0,
            laurel_rank=16,
            activation_sparsity_pattern=[0.0, 0.0],
        ),
        "minicpm3": causal("minicpm3", num_key_value_heads=4),
        "llama_classes": auto("AutoModelForSequenceClassification", "llama", num_labels=3),
    },
    "state space, linear attention": {
        "falcon_mamba": causal("falcon_mamba"),
        "bamba": causal("bamba", attn_layer_indices=[1], **_HYBRID),
        "falcon_h1": causal("falcon_h1", mamba_d_ssm=128, **_HYBRID),
        "granitemoehybrid": causal("granitemoehybrid", layer_types=["mamba", "attention"], **_HYBRID),
        "nemotron_h": causal(
            "nemotron_h",
            layers_block_type=["mamba", "moe", "attention"],
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=16,
            chunk_size=4,
            moe_shared_expert_intermediate_size=HIDDEN,
        ),
        "zamba2": causal(
            "zamba2",
            layers_block_type=["mamba", "hybrid"],
            n_mamba_heads=8,
            mamba_headdim=16,
            mamba_ngroups=2,
            mamba_d_state=16,
            chunk_size=4,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
        ),
        "recurrent_gemma": causal(
            "recurrent_gemma", lru_width=HIDDEN, attention_window_size=8, block_types=["recurrent", "attention"]
        ),
        "rwkv": causal("rwkv", attention_hidden_size=HIDDEN, context_length=64),
        "qwen3_5": causal("qwen3_5_text", **_GATED_DELTA),
        "qwen3_5_moe": causal("qwen3_5_moe_text", **_GATED_DELTA),
        "kimi_linear": causal(
            "kimi_linear",
            layer_types=["linear_attention", "full_attention"],
            linear_head_dim=16,
            linear_num_heads=4,
            num_key_value_heads=4,
        ),
        "linear_attention": zoo_modules.linear_attention,
    },
    "encoder": {
        "bert_answers": auto("AutoModelForQuestionAnswering", "bert"),
        "bert_tokens": auto("AutoModelForTokenClassification", "bert", num_labels=5),
        "bert_classes": auto("AutoModelForSequenceClassification", "bert", num_labels=3),
        "xlm_roberta": auto("AutoModelForSequenceClassification", "xlm-roberta", num_labels=3),
        "distilbert_answers": auto("AutoModelForQuestionAnswering", "distilbert", dim=HIDDEN, hidden_dim=2 * HIDDEN),
        "esm": auto("AutoModelForMaskedLM", "esm", mask_token_id=4, position_embedding_type="rotary"),
        "fnet": auto("AutoModelForMaskedLM", "fnet"),
        "squeezebert": auto("AutoModelForMaskedLM", "squeezebert"),
        "xlnet": auto(
            "AutoModelForSequenceClassification", "xlnet", n_layer=2, n_head=4, d_inner=2 * HIDDEN, num_labels=3
        ),
        "longformer": auto("AutoModelForMaskedLM", "longformer", attention_window=[4, 4]),
        "nomic_bert": auto("AutoModel", "nomic_bert"),
    },
    "mixture of experts": {
        "lfm2_moe": causal("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
        "flex_olmo": causal("flex_olmo"),
        "glm4_moe_lite": causal("glm4_moe_lite", num_key_value_heads=4),
        "experts_in_a_loop": zoo_modules.experts_in_a_loop,
    },
    "adapter": {"llama_lora": zoo_modules.llama_lora, "llama_lora_merged": zoo_modules.llama_lora_merged},
}
ENCODER_DECODERS: Final = {
    "marian": seq2seq("marian", forced_eos_token_id=None),
    "mbart": seq2seq("mbart"),
    "umt5": seq2seq("umt5"),
    "blenderbot": seq2seq("blenderbot"),
    "switch_transformers": seq2seq("switch_transformers", num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "led": seq2seq(
        "led", attention_window=[4, 4], max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
    ),
}
