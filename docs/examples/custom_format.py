"""Custom formats: any element of 2 to 8 bits, any block of 16 to 128.

A format is a name, `mxint3`, `mxfp5_e3m1`, `mxint3:64`, or a value, `integer(3)`, `floating(3, 1)`. It works wherever
a standard one does, but has no kernel: the reference runs it in plain PyTorch.
"""

import torch
from torch import nn

import mxcompile
from mxcompile.formats import MXINT8, floating, integer, parse_format
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.writing import sqnr_db

FORMATS = (
    parse_format("mxint8"),
    floating(exponent_bits=3, mantissa_bits=2),
    floating(exponent_bits=3, mantissa_bits=1),
    parse_format("mxint4"),
    integer(3),
    integer(3).with_block(128),
    integer(2),
)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    x = torch.randn(32, 256)
    program = mxcompile.trace(model, x)
    print(f"{'weights in':12} {'bits a value':>12} {'kB':>6} {'SQNR of outputs, dB':>20}")
    for fmt in FORMATS:
        lowered = mxcompile.Pipeline([LowerMX(weight=fmt, activation=MXINT8)]).run(program)
        error, size = sqnr_db(program(x), lowered(x)), lowered.stored_bytes()
        print(f"{fmt!s:12} {fmt.bits_per_value:>12g} {size / 1e3:>6.0f} {error:>20.1f}")


if __name__ == "__main__":
    main()
