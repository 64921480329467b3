"""Mixed precision by module pattern: which layers are worth more bits, and which can stay float.

Patterns are shell-style, on a parameter's full name or its module's path; of several that match the last one counts.
"""

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.diagnostics.tables import table
from mxcompile.formats import MXFP8_E4M3, MXINT8
from mxcompile.numerics.metrics import kl_divergence

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
    wanted, pipeline = program(**example).logits, mxcompile.recipes()["w4a8-mxint-quick"]
    rows = []
    for name, overrides in MIXES.items():
        mixed = pipeline.with_overrides(overrides) if overrides else pipeline
        lowered = mixed.run(program)
        kl = kl_divergence(wanted, lowered(**example).logits)
        rows.append((name, f"{lowered.stored_bytes() / 1e3:.0f}", f"{kl:.4f}"))
    Console().print(table(("weights",), ("kB", "KL, nats"), rows))
    print(f"the last pipeline: {mixed}")


if __name__ == "__main__":
    main()
