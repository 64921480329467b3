"""Microscaling formats as values: element type, block size, and the rules that pick a block's scale.

A block of `block_size` elements shares one power-of-two scale, stored as E8M0 (value `2**(byte - 127)`, 255 = NaN).
Floating formats and MXINT8 follow the OCP Microscaling Formats specification v1.0. MXINT6 and MXINT4 are *not* OCP:
they are the extension of MXINT8 to fewer bits used by Sharify et al. (arXiv 2405.07135). OCP fixes the block at 32;
16, 64 and 128 are offered because the paper and other toolkits use them.

Any other element type of 2 to 8 bits is spelled out in its name, `mxint3` or `mxfp5_e3m1`, and is accepted wherever a
format is; `integer` and `floating` construct them. They have no kernels and run as the reference.
"""

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

from mxcompile.arguments import checked
from mxcompile.errors import MXCompileError, UnknownNameError

BLOCK_SIZES: Final = (16, 32, 64, 128)
SCALE_BIAS: Final = 127
SCALE_NAN: Final = 255
_ALIGNED: Final = "+aligned"
_NAME: Final = re.compile(r"mxint(?P<integer>\d+)|mxfp(?P<bits>\d+)_e(?P<exponent>\d+)m(?P<mantissa>\d+)")


@dataclass(frozen=True)
class MXFormat:
    """One MX format.

    Elements have magnitudes `m * 2**(e - mantissa_bits)` with `emin <= e <= emax`. Integers are the case
    `emin == emax == 0` (all elements one step apart); floats have subnormals at `e == emin`.
    `max_value` is the largest finite magnitude of an element (E4M3 and E5M2 reserve codes above it).
    aligned: values are aligned to one power of two per token after quantization (`reference.align`), for activations
    that are to run on FP8 tensor cores; "mxfp8_e4m3+aligned".
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    emin: int
    emax: int
    max_value: float
    block_size: int = 32
    aligned: bool = False

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

    @checked
    def with_block(self, block_size: int) -> Self:
        """The same element type with another block size (16, 32, 64 or 128)."""
        if block_size not in BLOCK_SIZES:
            raise MXCompileError(f"block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        return replace(self, block_size=block_size)

    def with_alignment(self, aligned: bool = True) -> Self:
        """The same format, aligned or not. Raises MXCompileError if alignment is not defined for it."""
        if aligned and self.name != "mxfp8_e4m3":
            why = "are e4m3 numbers times one power of two already" if self.name in E4M3_COMPATIBLE else "cannot be"
            raise MXCompileError(f"only mxfp8_e4m3 activations are aligned: those of {self.name} {why}")
        return replace(self, aligned=aligned)

    def blocks(self, size: int) -> int:
        """Number of blocks that hold `size` values; the last one is padded with zeros."""
        return -(-size // self.block_size)

    def storage_bytes(self, rows: int, size: int) -> int:
        """Bytes of elements and scales for `rows` rows of `size` values."""
        return rows * self.blocks(size) * (self.block_bytes + 1)

    def __str__(self) -> str:
        block = "" if self.block_size == 32 else f":{self.block_size}"
        return f"{self.name}{block}{_ALIGNED if self.aligned else ''}"


@checked
def integer(bits: int) -> MXFormat:
    """Two's complement elements of 2 to 8 bits, symmetric: MXINT8 is `integer(8)`, and `integer(2)` has -1, 0 and 1."""
    if not 2 <= bits <= 8:
        raise MXCompileError(f"an integer element has 2 to 8 bits, not {bits}")
    return MXFormat(f"mxint{bits}", bits, 0, bits - 2, 0, 0, 2 - 2.0 ** (2 - bits))


@checked
def floating(exponent_bits: int, mantissa_bits: int) -> MXFormat:
    """Elements of a sign, 1 to 5 exponent bits (biased as IEEE's) and a mantissa, 8 bits at most, with subnormals.

    Every code is a finite number, as in OCP's 6-bit and 4-bit formats, with two exceptions: with 5 exponent bits the
    largest exponent encodes Inf and NaN, as in OCP's E5M2, and `floating(4, 3)` is OCP's E4M3, which has a NaN. Without
    a mantissa, a value halfway between two powers of two rounds to the larger one.
    """
    bits = 1 + exponent_bits + mantissa_bits
    if not 1 <= exponent_bits <= 5 or mantissa_bits < 0 or bits > 8:
        raise MXCompileError(
            f"a floating element of {exponent_bits} exponent and {mantissa_bits} mantissa bits: give 1 to 5 exponent "
            "bits, and at most 8 bits with the sign"
        )
    name = f"mxfp{bits}_e{exponent_bits}m{mantissa_bits}"
    if name in _FORMATS_BY_NAME:
        return _FORMATS_BY_NAME[name]
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
"""The formats that have kernels."""
E4M3_COMPATIBLE: Final = frozenset({"mxfp4", "mxint4", "mxfp6_e2m3", "mxfp6_e3m2"})
"""Activation formats whose tokens are e4m3 numbers times one power of two, except for tiny values
(`layout/fp8_eligibility.py`)."""
_FORMATS_BY_NAME: Final = FORMATS | {"mxfp8": MXFP8_E4M3, "mxfp6": MXFP6_E3M2, "mxfp4_e2m1": MXFP4}


@checked
def parse_format(text: str) -> MXFormat:
    """`"mxint4"`, `"mxint4:64"` with a block size, `"mxfp8_e4m3+aligned"` for aligned activations.

    `mxfp8` means E4M3 and `mxfp6` E3M2.

    Raises UnknownNameError for an unknown name, MXCompileError for an impossible format.
    """
    plain, aligned, _ = text.strip().lower().partition(_ALIGNED)
    if aligned and text.strip().lower() == plain + _ALIGNED:
        return parse_format(plain).with_alignment()
    name, colon, block = text.strip().lower().partition(":")
    fmt = _FORMATS_BY_NAME.get(name) or _parse_element_name(name)
    if fmt is None:
        raise UnknownNameError("format", text, _FORMATS_BY_NAME)
    if not colon:
        return fmt
    if not block.isdecimal():
        raise MXCompileError(f"format {text!r}: after ':' comes the block size, as in {name}:64")
    return fmt.with_block(int(block))


def as_format(fmt: "MXFormat | str") -> MXFormat:
    """A format given as one or as text. Raises UnknownNameError or MXCompileError for anything else."""
    if isinstance(fmt, MXFormat):
        return fmt
    if isinstance(fmt, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        return parse_format(fmt)
    raise MXCompileError(f"{fmt!r} is not a format: give mxcompile.formats.MXINT4, or its name 'mxint4'")


def check_name(fmt: MXFormat) -> None:
    """Raise MXCompileError if a format differs from what its name stands for: graphs and files store only the name."""
    if fmt != parse_format(str(fmt)):
        raise MXCompileError(f"{fmt!r} is not what {str(fmt)!r} means: make formats with integer(...), floating(...)")


def why_no_kernel(fmt: MXFormat) -> str | None:
    """Why a format has no kernels, in a sentence; None for those of `FORMATS`."""
    return None if fmt.name in FORMATS else f"there is no kernel for {fmt.name}"


def _parse_element_name(name: str) -> MXFormat | None:
    """The format of a name that spells out its elements; None if the name does not."""
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
    """How a block's scale X is computed from its largest magnitude: X = 2**ceil(log2(amax / T)).

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
        """T / 2**emax, in [1, 2]: a block whose amax has a larger mantissa gets the next larger scale."""
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


@checked
def parse_scale_rule(text: str) -> ScaleRule:
    """A scale rule by its text: floor, even, rceil, ceil, 7.25 or mse."""
    try:
        return ScaleRule(text.strip().lower())
    except ValueError:
        raise UnknownNameError("scale rule", text, (r.value for r in ScaleRule)) from None


def as_scale_rule(rule: ScaleRule | str) -> ScaleRule:
    """A scale rule given as one or as text. Raises UnknownNameError or MXCompileError for anything else."""
    if isinstance(rule, ScaleRule):
        return rule
    if isinstance(rule, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        return parse_scale_rule(rule)
    raise MXCompileError(f"{rule!r} is not a scale rule: give ScaleRule.FLOOR, or its name 'floor'")


def activation_rule(fmt: MXFormat | str) -> ScaleRule:
    """The scale rule with the least error on activation-like data (normal to heavy-tailed) for a format.

    Measured at block 32 on Gaussian, Laplace and Student-t(5) samples. Best are FLOOR for integers, RCEIL for
    formats whose largest element is 1.75 * 2**emax, EVEN (by a little) for E2M3, threshold 7.25 for MXFP4.
    """
    fmt = as_format(fmt)
    if fmt.is_integer:
        return ScaleRule.FLOOR
    if fmt.name == MXFP4.name:
        return ScaleRule.T725
    return ScaleRule.RCEIL if fmt.max_value == 1.75 * 2.0**fmt.emax else ScaleRule.EVEN
