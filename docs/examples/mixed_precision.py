"""Mixed precision by module pattern: more bits for some layers, float for others.

Patterns are shell-style and match a parameter's full name or its module's path; the last matching pattern wins.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.formats import MXFP8_E4M3, MXINT8
from mxcompile.passes.writing import kl_divergence

MIXES = {
    "all in mxint4": {},
    "down projections in mxint8": {"*.down_proj": MXINT8},
    "attention in mxfp8": {"*.self_attn.*": MXFP8_E4M3},
    "first layer in mxint8, but its v_proj float": {
        "model.layers.0.*": MXINT8,
        "model.layers.0.self_attn.v_proj": None,
    },
}


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    example = {"input_ids": torch.randint(256, (2, 32))}
    program = mxcompile.trace(model, example)
    float_logits, pipeline = program(**example).logits, mxcompile.recipes()["w4a8-mxint-quick"]
    print(f"{'weights':46} {'kB':>6} {'KL, nats':>10}")
    for name, overrides in MIXES.items():
        mixed = pipeline.with_overrides(overrides) if overrides else pipeline
        lowered = mixed.run(program)
        kl = kl_divergence(float_logits, lowered(**example).logits)
        print(f"{name:46} {lowered.stored_bytes() / 1e3:>6.0f} {kl:>10.4f}")
    print(f"the last pipeline: {mixed}")


if __name__ == "__main__":
    main()
