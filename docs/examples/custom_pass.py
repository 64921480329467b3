"""A custom pass: the worst 5 % of layers keep 8 bits, all others get 4.

passes/README.md explains it. Runs in seconds on a small random Llama with one layer that is hard to round.
"""

import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile import formats
from mxcompile.passes.writing import Pass, PassResult, Request, choose, finite_rows, observers, rounding_db, sqnr_db


@dataclass(frozen=True)
class WorstLayers(Pass):
    """Choose `high` for the `share` of layers that lose most in `low`."""

    low: formats.MXFormat = formats.MXINT4
    high: formats.MXFormat = formats.MXINT8
    share: float = 0.05
    name = "worst-layers"
    preserves_function = True

    def requests(self, program):
        return [Request(matmul.activation.name, observers.ChannelImportance) for matmul in choose(program).matmuls]

    def run(self, program):
        choice, sqnr = choose(program), {}
        for matmul, request in program.track(list(zip(choice.matmuls, self.requests(program), strict=True))):
            weight = finite_rows(program, matmul)  # [..., out, in]
            sqnr[matmul.parameter] = rounding_db(weight, self.low, request.result(program))
        worst = sorted(sqnr, key=sqnr.get)[: math.ceil(self.share * len(sqnr))]
        new = [name for name in worst if program.formats.get(name) != self.high]
        program.formats |= dict.fromkeys(new, self.high)
        return PassResult(len(new), choice.misses, {name: {"sqnr_db": sqnr[name]} for name in worst})


PLAIN = "round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"


def small_llama() -> LlamaForCausalLM:
    """Four layers; one weight of the third has an outlier in every block, which leaves few levels to other elements."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        weight = model.model.layers[2].mlp.down_proj.weight
        weight.mul_(8)
        weight[:, ::32] *= 8
    return model


def main() -> None:
    model, example = small_llama(), {"input_ids": torch.arange(64).reshape(2, 32)}
    program = mxcompile.trace(model, example)
    float_logits = program(**example).logits
    print(f"{'pipeline begins with':28} {'kB':>6} {'SQNR of logits, dB':>20}")
    for text in (PLAIN, f"worst-layers | {PLAIN}"):
        lowered = mxcompile.Pipeline.parse(text, passes=[WorstLayers]).run(program)
        error = sqnr_db(float_logits, lowered(**example).logits)
        print(f"{text.split(' | ')[0]:28} {lowered.stored_bytes() / 1e3:>6.0f} {error:>20.1f}")
    print(f"\n{'kept in mxint8':40} {'SQNR in mxint4, dB':>20}")
    for name, numbers in lowered.ledger[0].numbers.items():
        print(f"{name:40} {numbers['sqnr_db']:>20.1f}")


if __name__ == "__main__":
    main()
