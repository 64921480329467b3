"""`mx::cpu_linears` in C++ for few tokens: the same bits as through Python, which handles all other calls."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crossed import crossed

from mxcompile.formats import MXFP4, MXINT8, ScaleRule, parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.cpu import build, linears
from mxcompile.numerics import packing, reference

LINEARS, IN_PYTHON = torch.ops.mx.cpu_linears.default, torch.ops.mx.linears.default


def why_not():
    try:
        build.operator()
    except build.BuildError as error:
        return str(error)
    return None


needs_operator = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def arguments(x, name, activation, rows=(48, 7)):
    """Arguments of `mx::cpu_linears`, for weights with and without a bias."""
    fmt, generator = parse_format(name), torch.Generator().manual_seed(0)
    packed = [reference.quantize(torch.randn(n, x.shape[-1], generator=generator), fmt, ScaleRule.FLOOR) for n in rows]
    elements, scales = [packing.pack(codes, fmt) for codes, _ in packed], [scales for _, scales in packed]
    biases = [None, torch.randn(rows[1], generator=generator).to(x.dtype)]
    return x, elements, scales, biases, name, activation, activation and "floor"


@needs_operator
@pytest.mark.parametrize(
    ("name", "rounded", "dtype"),
    crossed(
        ["mxint4", "mxfp4:64", "mxfp6_e2m3", "mxint8:16"], [True, False], [torch.float32, torch.bfloat16, torch.float16]
    ),
)
def test_the_same_bits_as_in_python(name, rounded, dtype):
    activation = str(MXINT8.with_block(parse_format(name).block_size)) if rounded else None
    for shape in ((1, 96), (1, 1, 96), (2, 2, 77), (3, 64), (5, 96), (96,), (0, 96)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        given = arguments(x, name, activation)
        for y, expected in zip(LINEARS(*given), IN_PYTHON(*given), strict=True):
            assert y.shape == expected.shape
            assert torch.equal(y, expected)


@needs_operator
def test_python_is_asked_once_for_each_kind_of_call(monkeypatch):
    given = arguments(torch.randn(1, 96), "mxint4:128", "mxint8:128")
    LINEARS(*given)
    monkeypatch.delattr(dispatch, "linears")
    LINEARS(*given)
    LINEARS(torch.randn(4, 96), *given[1:])
    strided = torch.randn(96, 2).T
    for x in (torch.randn(5, 96), torch.randn(1, 96).half(), strided):
        with pytest.raises(RuntimeError, match="mx::linears"):
            LINEARS(x, *given[1:3], [None, None], *given[4:])


@needs_operator
@pytest.mark.parametrize("part", ["elements", "scales"])
def test_weights_with_strides(part):
    x, elements, scales, biases, *rest = arguments(torch.randn(2, 96), "mxint4", "mxint8")
    parts = {"elements": elements, "scales": scales}
    expected = IN_PYTHON(x, elements, scales, biases, *rest)
    parts[part] = [tensor.T.contiguous().T for tensor in parts[part]]
    for y, right in zip(LINEARS(x, parts["elements"], parts["scales"], biases, *rest), expected, strict=True):
        assert torch.equal(y, right)


@needs_operator
def test_a_nan_scale_and_the_smallest_scale():
    """Scale byte 255 makes its row NaN; byte 0 is 2^-127, not zero."""
    x, elements, scales, _, *rest = arguments(torch.full((1, 64), 2.0**99), "mxfp4", "mxint8", rows=(5, 4))
    scales[0][2, 1], scales[0][3] = 255, 0
    elements[0][3] = 0x22
    y = LINEARS(x, elements, scales, [None, None], *rest)[0]
    assert y.isnan().tolist() == [[False, False, True, False, False]]
    assert y[0, 3].item() == 64 * 2.0 ** (99 - 127)


def test_what_cannot_be_built_stays_in_python(monkeypatch, caplog):
    def missing():
        raise build.BuildError("there is no header")

    monkeypatch.setattr(linears, "operator", missing)
    linears._register_native_call.cache_clear()
    caplog.set_level(logging.INFO, logger="mxcompile")
    given = arguments(torch.randn(1, 96), "mxfp4", "mxfp8_e4m3")
    try:
        for _ in range(2):
            IN_PYTHON(*given)
    finally:
        linears._register_native_call.cache_clear()
    reasons = [record.message for record in caplog.records if "Python" in record.message]
    assert reasons in ([], ["linear layers with few tokens are dispatched through Python: there is no header"])
    assert bool(reasons) == (linears.supports(given[0], MXFP4) is None)


@pytest.mark.slow
@needs_operator
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="reads a library with nm")
def test_a_compiler_that_links_its_own_standard_library_keeps_it_to_itself(tmp_path):
    """torch loads another libstdc++ into the process; a mixture of both crashes when an exception is thrown."""
    made = tmp_path / "operator.so"
    source = Path(build.__file__).parent / "mx_cpu_operator.cpp"
    command = [build._compiler(), "-static-libstdc++", *build._OPTIONS, str(source), *build._torch_options()]
    build._build(command, made)
    listed = ["nm", "-C", "--defined-only", str(made)]
    assert " std::locale::id::" in subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    exported = subprocess.run([*listed, "--dynamic"], capture_output=True, text=True, check=True).stdout
    assert "mx_register_kernel" in exported
    assert "std::locale" not in exported
