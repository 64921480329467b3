"""A pass of your own: the worst 5 % of layers keep 8 bits, all others get 4.

passes/README.md takes you through it. Runs in seconds on a small random Llama, one layer of which is hard to round.
"""

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile import Pass, PassResult, Request, choose, formats, observers
from mxcompile.analysis.matmuls import finite_rows
from mxcompile.diagnostics.tables import table
from mxcompile.numerics.metrics import rounding_db, sqnr_db


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
        for matmul, request in program.through(list(zip(choice.matmuls, self.requests(program), strict=True))):
            weight = finite_rows(program, matmul)  # [..., out, in]
            sqnr[matmul.parameter] = rounding_db(weight, self.low, request.result(program))
        worst = sorted(sqnr, key=sqnr.get)[: math.ceil(self.share * len(sqnr))]
        new = [name for name in worst if program.formats.get(name) != self.high]
        program.formats |= dict.fromkeys(new, self.high)
        return PassResult(len(new), choice.misses, {name: {"sqnr_db": sqnr[name]} for name in worst})


PLAIN = "round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"


def small_llama() -> LlamaForCausalLM:
    """Four layers; a weight of the third one has an outlier in every block, which leaves few levels to the others."""
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
    wanted = program(**example).logits
    rows = []
    for text in (PLAIN, f"worst-layers | {PLAIN}"):
        lowered = mxcompile.Pipeline.parse(text, passes=[WorstLayers]).run(program)
        error = sqnr_db(wanted, lowered(**example).logits)
        rows.append((text.split(" | ")[0], f"{lowered.stored_bytes() / 1e3:.0f}", f"{error:.1f}"))
    Console().print(table(("pipeline begins with",), ("kB", "SQNR of logits, dB"), rows))
    kept = [(name, f"{numbers['sqnr_db']:.1f}") for name, numbers in lowered.ledger[0].numbers.items()]
    Console().print(table(("kept in mxint8",), ("SQNR in mxint4, dB",), kept))


if __name__ == "__main__":
    main()
