"""Experts on the CPU: products within the accumulated-rounding bound, the rounding between them bit for bit."""

import pytest
import torch
from cpu_kernels import needs_compiler, packed
from crossed import crossed

from mxcompile.formats import FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule, parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.cpu import experts, linears
from mxcompile.numerics import packing, reference
from mxcompile.numerics.gates import Gate

pytestmark = needs_compiler
FORMAT_NAMES = [*FORMATS, "mxint4:16", "mxfp4:64", "mxint6:16", "mxfp6_e3m2:128", "mxint8:128"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = ScaleRule.FLOOR
RELU = Gate("relu")
NOBODY = (-1, 5)
"""Numbers that none of five experts has."""


def experts_of(fmt, count, rows, size, dtype=torch.float32, bias=False):
    """((elements, scales, bias), values as the kernels decode them to the dtype `[count, rows, size]`)."""
    elements, scales, _ = packed(fmt, count * rows, size, seed=rows)
    values = linears.decode(elements, scales, fmt, size, dtype).unflatten(0, (count, rows))
    biases = torch.randn(count, rows, generator=torch.Generator().manual_seed(rows)).to(dtype) if bias else None
    return (elements.unflatten(0, (count, rows)), scales.unflatten(0, (count, rows)), biases), values


def choices(tokens, slots, numbers=5):
    return torch.randint(0, numbers, (tokens, slots), generator=torch.Generator().manual_seed(tokens))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def selection(fmt, count, order, size):
    """Packed experts whose row r is 1 at `order[r]`, times 2^expert: their products are exact."""
    values = torch.zeros(len(order), size).index_put_((torch.arange(len(order)), torch.tensor(order)), torch.ones(()))
    values = values * torch.exp2(torch.arange(count))[:, None, None]
    codes, scales = reference.quantize(values, fmt, FLOOR)
    assert torch.equal(reference.dequantize(codes, scales, fmt, size, torch.float32), values)
    return (packing.pack(codes, fmt), scales, None), values


@pytest.mark.parametrize(("name", "dtype", "tokens"), crossed(FORMAT_NAMES, DTYPES, [1, 2, 7, 60]))
def test_products_are_within_the_bound(name, dtype, tokens, error_over_bound):
    """1 to 4 choices of an expert, and many; some numbers are no expert's."""
    fmt = parse_format(name)
    for rows, size, bias in ((140, 96, True), (33, 77, False)):
        weight, values = experts_of(fmt, 5, rows, size, dtype, bias)
        x, chosen = random(tokens, size).to(dtype), choices(tokens, 3)
        chosen[0, 1:] = torch.tensor(NOBODY)
        y = experts.grouped_linear(x, chosen, weight, fmt).unflatten(0, chosen.shape)
        assert y.dtype == dtype
        assert (y[0, 1:] == 0).all()
        for token in range(tokens):
            for slot, expert in enumerate(chosen[token].tolist()):
                if expert not in NOBODY:
                    b = None if weight[2] is None else weight[2][expert]
                    assert error_over_bound(y[token, slot][None], x[token][None], values[expert], b) <= 1


def bound_of_sum(h, down, bias, weights, dtype):
    """(the weighted sum of down @ h + bias in float64, its largest error): h `[tokens, k, inner]`, down `[tokens, k,
    hidden, inner]`, bias `[tokens, k, hidden]`; see `error_over_bound`. Each output may be rounded once more."""
    y = torch.einsum("tkhi,tki->tkh", down.double(), h.double()) + bias.double()
    sizes = torch.einsum("tkhi,tki->tkh", down.double().abs(), h.double().abs()) + bias.double().abs()
    w, unit, eps = weights.double()[..., None], 2.0**-23, torch.finfo(dtype).eps
    steps = (h.shape[-1] + 2 + h.shape[1]) * unit
    exact = (y * w).sum(1)
    error = ((steps * sizes + eps / 2 * y.abs()) * w.abs()).sum(1) * 1.01
    return exact, error + eps / 2 * (exact.abs() + error) + 1e-37


@pytest.mark.parametrize(
    ("up_name", "down_name", "activation", "dtype", "choice_shape"),
    crossed(
        FORMAT_NAMES,
        ["mxint4", "mxfp4", "mxfp6_e2m3", "mxint8:64"],
        ["mxint8", "mxfp8_e4m3", None],
        DTYPES,
        [(1, 4), (3, 2), (40, 3)],
    ),
)
def test_experts_are_within_the_bound(up_name, down_name, activation, dtype, choice_shape):
    """With channels that are exact, so that the value between the matmuls is known to the bit. That of float16 stays
    float32 unless it is rounded."""
    fmt, down_fmt, inner, size = parse_format(up_name), parse_format(down_name), 77, 160
    rounding = None if activation is None else (parse_format(activation).with_block(down_fmt.block_size), FLOOR)
    up, up_values = selection(fmt, 5, [(7 * row) % size for row in range(2 * inner)], size)
    down, down_values = experts_of(down_fmt, 5, 130, inner, dtype, bias=True)
    x = (random(choice_shape[0], size) / 64).to(dtype)  # results within the range of float16
    if rounding is not None:
        x = reference.quantize_dequantize(x, *rounding)
    chosen, weights = choices(*choice_shape), random(*choice_shape, seed=1).abs()
    between = torch.float32 if dtype == torch.float16 and rounding is None else dtype
    h = RELU((up_values.to(between)[chosen] @ x.to(between)[:, None, :, None]).squeeze(-1))
    if rounding is not None:
        h = reference.quantize_dequantize(h, *rounding)
    y = experts.experts(x, chosen, weights, (up, fmt), (down, down_fmt), RELU, rounding)
    assert y.dtype == dtype
    exact, bound = bound_of_sum(h, down_values[chosen], down[2][chosen], weights, dtype)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("name", "activation", "rule", "dtype", "tokens"),
    crossed(
        ["mxint4", "mxfp4:16", "mxfp8_e5m2"],
        ["mxint8", "mxfp8_e4m3:64", "mxfp4", "mxint6:16"],
        [FLOOR, ScaleRule.EVEN, ScaleRule.RCEIL],
        [torch.float32, torch.bfloat16],
        [1, 4, 50],
    ),
)
def test_the_rounding_is_the_references(name, activation, rule, dtype, tokens, assert_same_bits):
    """One choice of weight 1, and weights of 1: the result is the value between the matmuls."""
    fmt, rounding, inner = parse_format(name), (parse_format(activation), rule), 96
    up, _ = selection(fmt, 1, [*range(inner), *range(inner)], inner)
    down, _ = selection(fmt, 1, list(range(inner)), inner)
    x = (random(tokens, inner) * torch.exp2(random(tokens, inner, seed=1) * 3)).to(dtype)
    zeros, ones = torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1).to(dtype)
    y = experts.experts(x, zeros, ones, (up, fmt), (down, fmt), RELU, rounding)
    expected = reference.quantize_dequantize(RELU(torch.cat([x, x], -1)), *rounding)
    assert_same_bits(y + 0.0, expected + 0.0)


GATES = [
    Gate(),
    Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True),
    Gate("gelu", limit=3.0),
    Gate("gelu_tanh", shift=1.0, interleaved=True),
    Gate("relu", interleaved=True),
]


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(gate):
    """Close to float64 except in the tails of GELU; in bfloat16 the bits of torch, which rounds after each step."""
    channels = torch.cat([torch.linspace(-120, 120, 4001), random(999) * 4, torch.tensor([0.0, 1e-30])])
    channels = torch.stack([channels, channels.flip(0), channels.roll(7), channels], 1)
    exact, is_gelu = gate(channels.double()), gate.function.startswith("gelu")
    error = (experts._apply_gate(channels, gate).double() - exact).abs()
    assert (error <= 1e-5 * exact.abs() + (1e-5 if is_gelu else 1e-34)).all()
    rounded = channels.bfloat16()
    y, expected = experts._apply_gate(rounded, gate), gate(rounded)
    equal = (y == expected) | (is_gelu & (gate(rounded.double()).abs() < 1e-2))
    assert equal.float().mean() > 0.999


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates_keep_what_is_not_a_number(gate):
    for at in range(4):
        channels = torch.ones(1, 4)
        channels[0, at] = float("nan")
        assert torch.equal(experts._apply_gate(channels, gate).isnan(), gate(channels).isnan())


def arguments(dtype=torch.float32, tokens=3, slots=4):
    up, down = experts_of(MXINT4, 5, 128, 96, dtype, bias=True)[0], experts_of(MXFP4, 5, 200, 64, dtype, bias=True)[0]
    x = reference.quantize_dequantize(random(tokens, 96).to(dtype), MXINT8, FLOOR)
    weights = random(tokens, slots, seed=1)
    return x, choices(tokens, slots, 7) - 1, weights, (up, MXINT4), (down, MXFP4), Gate(), (MXINT8, FLOOR)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_with_any_number_of_threads_and_on_repeat(dtype, tokens):
    given, threads = arguments(dtype, tokens), torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(count), experts.experts(*given))[1] for count in (1, 2, 3, 1)]
        numbers, weight = given[1], (*given[3][0], given[3][1])
        results += [experts.experts(*given)]
        products = [
            (torch.set_num_threads(count), experts.grouped_linear(given[0], numbers, weight[:3], weight[3]))[1]
            for count in (1, 2, 3)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(product, products[0]) for product in products)


@pytest.mark.parametrize("bias", [True, False])
def test_torch_multiplies_where_pairs_cannot(bias, error_over_bound, monkeypatch):
    """As on a processor without bfloat16 products."""
    monkeypatch.setattr(experts, "_takes_many", lambda *_: False)
    weight, values = experts_of(MXINT4, 5, 96, 160, torch.bfloat16, bias)
    x, chosen = random(60, 160).bfloat16(), choices(60, 3)
    chosen[:50], chosen[0, 0] = 1, -1
    y = experts.grouped_linear(x, chosen, weight, MXINT4).unflatten(0, chosen.shape)
    assert (y[0, 0] == 0).all()
    for expert in range(5):
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        b = None if weight[2] is None else weight[2][expert]
        assert error_over_bound(y[tokens, slots], x[tokens], values[expert], b) <= 1


@pytest.mark.parametrize("count", range(7, 13))
def test_few_and_many_choices_of_one_expert(count, error_over_bound):
    """Around the number from which an expert is decoded, with another that has one choice."""
    weight, values = experts_of(MXFP4, 2, 44, 96, torch.bfloat16, bias=True)
    x, chosen = random(count + 1, 96).bfloat16(), torch.tensor([[0]] * count + [[1]])
    y = experts.grouped_linear(x, chosen, weight, MXFP4)
    assert error_over_bound(y[:count], x[:count], values[0], weight[2][0]) <= 1
    assert error_over_bound(y[count:], x[count:], values[1], weight[2][1]) <= 1


@pytest.mark.parametrize("tokens", [2, 30])
def test_strides(tokens):
    x, chosen, weights, up, down, *rest = arguments(tokens=tokens)
    expected = experts.experts(x, chosen, weights, up, down, *rest)

    def strided(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    up, down = ((tuple(strided(part) for part in weight), fmt) for weight, fmt in (up, down))
    assert torch.equal(expected, experts.experts(strided(x), strided(chosen), strided(weights), up, down, *rest))
    assert torch.equal(expected, experts.experts(x, chosen.int(), weights.double(), up, down, *rest))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_choices(shape):
    x, _, _, up, down, *rest = arguments(tokens=shape[0])
    chosen = torch.zeros(shape, dtype=torch.int64)
    y = experts.experts(x, chosen, torch.ones(shape), up, down, *rest)
    assert torch.equal(y, torch.zeros(shape[0], 200))
    assert experts.grouped_linear(x, chosen, *up).shape == (0, 128)


@pytest.mark.parametrize("tokens", [1, 40])
def test_only_chosen_experts_are_read(tokens):
    """The others have NaN for scales."""
    x, _, _, up, down, *rest = arguments(tokens=tokens)
    chosen, weights = torch.tensor([[1, 3, 3, 9]]).expand(tokens, 4), torch.ones(tokens, 4)
    for scales in (up[0][1], down[0][1]):
        scales[[0, 2, 4]] = 255
    y = experts.experts(x, chosen, weights, up, down, *rest)
    assert y.isfinite().all()
    assert experts.experts(x, chosen - 1, weights, up, down, *rest).isnan().all()


def test_inputs_that_are_not_rounded_are_not_rounded():
    """x is taken as it is, though the value between the matmuls is rounded."""
    _, chosen, weights, up, down, gate, rounding = arguments()
    x = random(3, 96)
    y = experts.experts(x, chosen, weights, up, down, gate, rounding)
    h = gate(experts.grouped_linear(x, chosen, *up))
    h = reference.quantize_dequantize(h, *rounding)
    outputs = experts.grouped_linear(h, chosen.reshape(-1, 1), *down).view(3, 4, -1)
    torch.testing.assert_close(y, (outputs * weights[..., None]).sum(1), rtol=1e-5, atol=1e-4)


def test_dispatch_takes_them_or_says_why_not():
    x, chosen, weights, up, down, gate, rounding = arguments()
    first, second = dispatch.Experts(*up, None), dispatch.Experts(*down, None)
    assert dispatch.why_not_cpu_experts(x, first, second, rounding) is None
    y = dispatch.experts(x, chosen, weights, first, second, gate, rounding)
    assert torch.equal(y, experts.experts(x, chosen, weights, up, down, gate, rounding))
    assert "float64" in str(dispatch.why_not_cpu_experts(x.double(), first, second, None))
    assert "mse" in str(dispatch.why_not_cpu_experts(x, first, second, (MXINT8, ScaleRule.MSE)))
    aligned = (MXFP8_E4M3.with_alignment(True), FLOOR)
    assert "align" in str(dispatch.why_not_cpu_experts(x, first, second, aligned))
    composed = dispatch.experts(x, chosen, weights, first, second, gate, aligned)
    assert composed.isfinite().all()
    assert not torch.equal(composed, y)


@pytest.mark.parametrize("name", ["mxint4", "mxfp4", "mxfp4:128", "mxint4:16", "mxint8", "mxfp8_e4m3"])
def test_every_code_in_a_panel(name, error_over_bound):
    """All codes at all positions of a block, with scales from 2^-60 to 2^60 and NaN, times the identity."""
    fmt = parse_format(name)
    size, count = fmt.block_size, 60
    codes = (torch.arange(256)[:, None] + torch.arange(size)) % 2**fmt.bits
    scales = torch.arange(256, dtype=torch.uint8).clamp(67, 187)[:, None]
    scales[-1] = 255
    elements = packing.pack(codes.to(torch.uint8), fmt)
    x = torch.eye(size).repeat(-(-count // size), 1)[:count].bfloat16()
    y = experts.grouped_linear(x, torch.zeros(count, 1).int(), (elements[None], scales[None], None), fmt)
    values = linears.decode(elements, scales, fmt, size, torch.bfloat16)
    numbers = values.isfinite().all(1)
    assert not numbers[-1]
    assert torch.equal(y[:, numbers], (x.float() @ values[numbers].float().T).bfloat16())
    assert y[:, ~numbers].isnan().all()
