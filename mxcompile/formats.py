"""Microscaling formats as values: element type, block size, and the rules that pick a block's scale.

A block of `block_size` elements shares one power-of-two scale, stored as E8M0 (value `2**(byte - 127)`, 255 = NaN).
Floating formats and MXINT8 follow the OCP Microscaling Formats specification v1.0. MXINT6 and MXINT4 are *not* OCP:
they are the extension of MXINT8 to fewer bits used by Sharify et al. (arXiv 2405.07135). OCP fixes the block at 32;
16, 64 and 128 are offered because the paper and other toolkits use them.

Any other element of 2 to 8 bits has a name that says all of it, `mxint3` or `mxfp5_e3m1`, and can be used wherever a
format is asked for; `integer` and `floating` make them. They run as the reference does, no kernel serves them.
"""

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

from mxcompile.errors import MXCompileError, UnknownNameError

BLOCK_SIZES: Final = (16, 32, 64, 128)
SCALE_BIAS: Final = 127
SCALE_NAN: Final = 255
_NAME: Final = re.compile(r"mxint(?P<integer>\d+)|mxfp(?P<bits>\d+)_e(?P<exponent>\d+)m(?P<mantissa>\d+)")


@dataclass(frozen=True)
class MXFormat:
    """One MX format.

    A magnitude `m * 2**(e - mantissa_bits)` with `emin <= e <= emax` is an element; integers are the case
    `emin == emax == 0` (all elements one step apart), floats have subnormals at `e == emin`.
    `max_value` is the largest finite magnitude of an element (E4M3 and E5M2 reserve codes above it).
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    emin: int
    emax: int
    max_value: float
    block_size: int = 32

    @property
    def is_integer(self) -> bool:
        """True for MXINT formats (two's complement elements), False for MXFP (sign and magnitude)."""
        return self.exponent_bits == 0

    @property
    def max_code(self) -> int:
        """Code of `max_value`: its bit pattern without the sign."""
        mantissa = int(self.max_value * 2 ** (self.mantissa_bits - self.emax))
        return ((self.emax - self.emin) << self.mantissa_bits) + mantissa

    @property
    def bits_per_value(self) -> float:
        """Storage per value including the shared scale: 4.25 for MXFP4 at block 32."""
        return self.bits + 8 / self.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of the packed elements of one block, without its scale byte."""
        return self.block_size * self.bits // 8

    def with_block(self, block_size: int) -> Self:
        """The same element type with another block size (16, 32, 64 or 128)."""
        if block_size not in BLOCK_SIZES:
            raise MXCompileError(f"block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        return replace(self, block_size=block_size)

    def blocks(self, size: int) -> int:
        """Number of blocks that hold `size` values; the last one is padded with zeros."""
        return -(-size // self.block_size)

    def storage_bytes(self, rows: int, size: int) -> int:
        """Bytes of elements and scales for `rows` rows of `size` values."""
        return rows * self.blocks(size) * (self.block_bytes + 1)

    def __str__(self) -> str:
        return self.name if self.block_size == 32 else f"{self.name}:{self.block_size}"


def integer(bits: int) -> MXFormat:
    """Two's complement elements of 2 to 8 bits, symmetric: MXINT8 is `integer(8)`, and `integer(2)` has -1, 0 and 1."""
    if not 2 <= bits <= 8:
        raise MXCompileError(f"an integer element of {bits} bits: give 2 to 8")
    return MXFormat(f"mxint{bits}", bits, 0, bits - 2, 0, 0, 2 - 2.0 ** (2 - bits))


def floating(exponent_bits: int, mantissa_bits: int) -> MXFormat:
    """Elements of a sign, 1 to 5 exponent bits (biased as IEEE's) and a mantissa, 8 bits at most, with subnormals.

    Every code is a finite number, as in OCP's formats of 6 and 4 bits. But with 5 exponent bits the largest exponent
    stands for Inf and NaN, as in OCP's E5M2, and `floating(4, 3)` is OCP's E4M3, which has a NaN. Without a mantissa, a
    value halfway between two powers of two goes to the larger one.
    """
    bits = 1 + exponent_bits + mantissa_bits
    if not 1 <= exponent_bits <= 5 or mantissa_bits < 0 or bits > 8:
        raise MXCompileError(
            f"a floating element of {exponent_bits} exponent and {mantissa_bits} mantissa bits: give 1 to 5 exponent "
            "bits, and at most 8 bits with the sign"
        )
    name = f"mxfp{bits}_e{exponent_bits}m{mantissa_bits}"
    if name in _KNOWN:
        return _KNOWN[name]
    bias = 2 ** (exponent_bits - 1) - 1
    emax = bias + (exponent_bits < 5)
    return MXFormat(name, bits, exponent_bits, mantissa_bits, 1 - bias, emax, (2 - 2.0**-mantissa_bits) * 2.0**emax)


MXINT8: Final = integer(8)
MXINT6: Final = integer(6)
MXINT4: Final = integer(4)
MXFP8_E4M3: Final = MXFormat("mxfp8_e4m3", 8, 4, 3, -6, 8, 448.0)
MXFP8_E5M2: Final = MXFormat("mxfp8_e5m2", 8, 5, 2, -14, 15, 57344.0)
MXFP6_E3M2: Final = MXFormat("mxfp6_e3m2", 6, 3, 2, -2, 4, 28.0)
MXFP6_E2M3: Final = MXFormat("mxfp6_e2m3", 6, 2, 3, 0, 2, 7.5)
MXFP4: Final = MXFormat("mxfp4", 4, 2, 1, 0, 2, 6.0)

FORMATS: Final[dict[str, MXFormat]] = {
    f.name: f for f in (MXINT8, MXINT6, MXINT4, MXFP8_E4M3, MXFP8_E5M2, MXFP6_E3M2, MXFP6_E2M3, MXFP4)
}
"""Those that kernels serve."""
ALIGNED_AS_THEY_ARE: Final = frozenset({"mxfp4", "mxint4", "mxfp6_e2m3", "mxfp6_e3m2"})
"""Activations that are e4m3 numbers times one power of two for each token, unless they are tiny
(`layout/e4m3_products.py`)."""
_KNOWN: Final = FORMATS | {"mxfp8": MXFP8_E4M3, "mxfp6": MXFP6_E3M2, "mxfp4_e2m1": MXFP4}


def parse_format(text: str) -> MXFormat:
    """`"mxint4"` or, with a block size, `"mxint4:64"`. `mxfp8` means E4M3 and `mxfp6` E3M2.

    Raises UnknownNameError for what is no format, MXCompileError for one that cannot be.
    """
    name, colon, block = text.strip().lower().partition(":")
    fmt = _KNOWN.get(name) or _spelled_out(name)
    if fmt is None:
        raise UnknownNameError("format", text, _KNOWN)
    if not colon:
        return fmt
    if not block.isdecimal():
        raise MXCompileError(f"format {text!r}: after ':' comes the block size, as in {name}:64")
    return fmt.with_block(int(block))


def check_name(fmt: MXFormat) -> None:
    """Raise MXCompileError for a format that is not what its name says: graphs and files hold names."""
    if fmt != parse_format(str(fmt)):
        raise MXCompileError(f"{fmt!r} is not what {str(fmt)!r} means: make formats with integer(...), floating(...)")


def no_kernel(fmt: MXFormat) -> str | None:
    """Why no kernel serves a format, in a sentence; None for those of `FORMATS`."""
    return None if fmt.name in FORMATS else f"there is no kernel for {fmt.name}"


def _spelled_out(name: str) -> MXFormat | None:
    """The format whose name says what its elements are."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match["integer"]:
        return integer(int(match["integer"]))
    fmt = floating(int(match["exponent"]), int(match["mantissa"]))
    if fmt.bits != int(match["bits"]):
        raise MXCompileError(f"format {name!r} has {fmt.bits} bits with its sign: write {fmt.name}")
    return fmt


class ScaleRule(Enum):
    """How a block's scale X follows from its largest magnitude: X = 2**ceil(log2(amax / T)).

    FLOOR is OCP's (T = 2**(emax+1), exclusive); EVEN rounds amax to the element's mantissa first (AMD); RCEIL never
    saturates (NVIDIA); CEIL takes the ceiling of log2(amax); T725 is AutoRound's threshold for MXFP4. MSE tries the
    exponents floor-1, floor, floor+1 and keeps the one with the least squared error: for weights, offline.
    """

    FLOOR = "floor"
    EVEN = "even"
    RCEIL = "rceil"
    CEIL = "ceil"
    T725 = "7.25"
    MSE = "mse"

    def __str__(self) -> str:
        return self.value

    def threshold(self, fmt: MXFormat) -> float:
        """T / 2**emax, in [1, 2]: a block whose amax has a mantissa beyond it gets the next larger scale."""
        match self:
            case ScaleRule.FLOOR | ScaleRule.MSE:
                return 2.0
            case ScaleRule.EVEN:
                return 2.0 - 2.0 ** -(fmt.mantissa_bits + 1)
            case ScaleRule.RCEIL:
                return fmt.max_value / 2.0**fmt.emax
            case ScaleRule.CEIL:
                return 1.0
            case ScaleRule.T725:
                if fmt.name != MXFP4.name:
                    raise MXCompileError(f"scale rule 7.25 is a threshold of {MXFP4.name}, not of {fmt.name}")
                return 7.25 / 4.0


def parse_scale_rule(text: str) -> ScaleRule:
    """A scale rule by its text: floor, even, rceil, ceil, 7.25 or mse."""
    try:
        return ScaleRule(text.strip().lower())
    except ValueError:
        raise UnknownNameError("scale rule", text, (r.value for r in ScaleRule)) from None


def why_not_aligned(activation: MXFormat | None) -> str | None:
    """Why activations of a format are not aligned (`reference.align`), in a sentence; None for those that can be."""
    if activation is None:
        return "float activations are not aligned: give activation=mxfp8_e4m3"
    if activation.name == MXFP8_E4M3.name:
        return None
    if activation.name in ALIGNED_AS_THEY_ARE:
        return f"{activation.name} activations need no alignment: they are e4m3 numbers times one power of two a token"
    return f"{activation.name} activations cannot be aligned: only those of mxfp8_e4m3 can"


def input_text(activation: str | None, aligned: bool) -> str | None:
    """What a matmul's input is rounded to, for people: `mxfp8_e4m3 aligned`; None if it stays float."""
    return f"{activation} aligned" if aligned else activation


def activation_rule(fmt: MXFormat) -> ScaleRule:
    """The scale rule that loses least on activation-like data (normal to heavy-tailed), decided per format.

    Measured at block 32 on Gaussian, Laplace and Student-t(5) samples: integers want FLOOR; formats whose largest
    element is 1.75 * 2**emax want RCEIL; E2M3 gains a little from EVEN; MXFP4 wants the threshold 7.25.
    """
    if fmt.is_integer:
        return ScaleRule.FLOOR
    if fmt.name == MXFP4.name:
        return ScaleRule.T725
    return ScaleRule.RCEIL if fmt.max_value == 1.75 * 2.0**fmt.emax else ScaleRule.EVEN
