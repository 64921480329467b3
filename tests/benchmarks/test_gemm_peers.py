"""Other projects' kernels get the same weights as ours, and totals are of layers whose four shapes were all timed."""

import pytest
import torch

from mxcompile.formats import FORMATS, MXINT4, MXFormat
from mxcompile.numerics.reference import decode, scale_values

pytest.importorskip("triton")

import gemm_peers
import gemm_timing


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_timing, "DEVICE", "cpu")


def by_block(steps: torch.Tensor) -> torch.Tensor:
    return scale_values(steps).repeat_interleave(32, dim=1)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_codes_and_steps_are_the_weight(fmt: MXFormat) -> None:
    w = gemm_timing.make_weight(fmt, 64, 256)
    codes, steps = gemm_peers.stored(w)
    elements = codes - 2.0 ** (fmt.bits - 1) if fmt.is_integer else decode(codes, fmt)
    assert torch.equal(elements * by_block(steps), w.values.float())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_bits_follow_each_other(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 64), dtype=torch.uint8)
    rows = gemm_peers.in_a_row(codes, bits)
    for row, packed in zip(codes.tolist(), rows, strict=True):
        number = int.from_bytes(bytes(packed.tolist()), "little")
        assert [(number >> (bits * i)) & (2**bits - 1) for i in range(64)] == row


def test_tinygemm_multiplies_by_the_weight() -> None:
    """Its kernel for the CPU takes the same scales and zeros."""
    w = gemm_timing.make_weight(MXINT4, 64, 256)
    codes, steps = gemm_peers.stored(w)
    nibbles, scales_and_zeros = gemm_peers.tinygemm_parts(codes, steps)
    assert torch.equal(torch.stack([nibbles >> 4, nibbles & 15], dim=-1).flatten(-2), codes)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x := gemm_timing.tokens(5, 256), words, 32, scales_and_zeros)
    assert gemm_timing.Exact(x, w.values).error(y) <= 1


def test_totals_are_of_whole_layers() -> None:
    def line(path: str, n: int, k: int, us: float) -> dict[str, object]:
        name = {"weight": "mxint4", "activation": "bf16", "path": path, "n": n, "k": k, "m": 16}
        return name | {"us": us, "cublas_bf16_us": 30.0, "ratio": 30.0 / us}

    shapes = list(gemm_timing.SHAPES.values())
    ours = [line("gluon" if k > n else "planes", n, k, 10.0) for n, k in shapes]
    whole, part = [line("a 1.0", *s, 40.0) for s in shapes], [line("b 2.0", *s, 20.0) for s in shapes[:3]]
    _, *rows = gemm_timing.totals([*part, *whole, *ours])
    assert [row.split() for row in rows] == [
        ["mxint4", "bf16", "16", "a", "1.0", "160.0", "0.75x", "0.75x"],
        ["mxint4", "bf16", "16", "mxcompile", "40.0", "3.00x", "3.00x"],
    ]
