"""Formats of your own: any element of 2 to 8 bits, any block of 16 to 128.

A format is a name, `mxint3`, `mxfp5_e3m1`, `mxint3:64`, or a value, `integer(3)`, `floating(3, 1)`. It can be used
wherever one of the standard ones can; it runs by the reference, as no kernel serves it.
"""

import torch
from rich.console import Console
from torch import nn

import mxcompile
from mxcompile.diagnostics.tables import table
from mxcompile.formats import MXINT8, floating, integer, parse_format
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.passes.lower_mx import LowerMX

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
    rows = []
    for fmt in FORMATS:
        lowered = mxcompile.Pipeline([LowerMX(weight=fmt, activation=MXINT8)]).run(program)
        error, size = sqnr_db(program(x), lowered(x)), lowered.stored_bytes()
        rows.append((str(fmt), f"{fmt.bits_per_value:g}", f"{size / 1e3:.0f}", f"{error:.1f}"))
    Console().print(table(("weights in",), ("bits a value", "kB", "SQNR of outputs, dB"), rows))


if __name__ == "__main__":
    main()
