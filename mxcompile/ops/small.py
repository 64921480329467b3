"""What stands between the matmuls of a layer, fused with the rounding of the next matmul's input; and one token's
attention with all that surrounds it. Only compiled graphs on a GPU hold these operators."""

from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API

from mxcompile.kernels import dispatch
from mxcompile.numerics.gates import parse_gate
from mxcompile.numerics.norms import parse_norm
from mxcompile.ops.library import define, format_of, rounding_of, rule_of
from mxcompile.ops.linears import fake_quantize_dequantize


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, format: str, rule: str) -> Tensor:
    """`quantize_dequantize(norm(x))`: x `[..., size]`, weight and bias `[size]`; see `numerics/norms.py`."""
    return dispatch.add_norm(x, None, weight, bias, parse_norm(norm), (format_of(format), rule_of(rule)))[1]


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    """`(x + residual, quantize_dequantize(norm(x + residual)))`, each `[..., size]`."""
    return dispatch.add_norm(x, residual, weight, bias, parse_norm(norm), (format_of(format), rule_of(rule)))


def gate_product(gate: Tensor, up: Tensor, function: str, format: str, rule: str) -> Tensor:
    """`quantize_dequantize(f(gate) * up)`: gate and up `[..., inner]`, function the text of a `Gate`."""
    return dispatch.gate_product(gate, up, parse_gate(function), (format_of(format), rule_of(rule)))


def attend_next(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    scale: float,
    format: str | None,
    rule: str | None,
) -> Tensor:
    """Write the key and value of the next token to the cache, then attend to all of it; see
    `numerics/next_token.py`. The result is quantized and dequantized as `format` and `rule` say, if given."""
    new = (key, value, position, cos, sin)
    return dispatch.attend_next(query, keys, values, new, mask, scale, rounding_of(format, rule))


def _fake_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, format: str, rule: str) -> Tensor:
    parse_norm(norm)
    _check_of_size(x, weight, bias)
    return fake_quantize_dequantize(x, format, rule)


def _fake_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    check(x.shape == residual.shape and x.dtype == residual.dtype, lambda: "mx::add_norm adds tensors that are alike")
    return x.new_empty(x.shape), _fake_norm(x, weight, bias, norm, format, rule)


def _check_of_size(x: Tensor, *parameters: Tensor | None) -> None:
    fit = all(part is None or part.shape == x.shape[-1:] for part in parameters)
    check(fit, lambda: f"weight and bias of a norm of {x.shape[-1]} values have that size")


def _fake_gate_product(gate: Tensor, up: Tensor, function: str, format: str, rule: str) -> Tensor:
    parse_gate(function)
    check(gate.shape == up.shape and gate.dtype == up.dtype, lambda: "mx::gate_product takes tensors that are alike")
    return fake_quantize_dequantize(gate, format, rule)


def _fake_attend_next(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    scale: float,
    format: str | None,
    rule: str | None,
) -> Tensor:
    del mask, scale
    check((cos is None) == (sin is None), lambda: "cos and sin must be given together")
    check((format is None) == (rule is None), lambda: "format and rule must be given together")
    check(query.dim() == 4 and query.shape[2] == 1, lambda: "mx::attend_next takes one query per head")
    for new, cache in ((key, keys), (value, values)):
        fits = new.dim() == cache.dim() == 4 and new.shape[2] == 1 and new.shape[1::2] == cache.shape[1::2]
        check(fits, lambda: "the next token's keys and values do not fit the cache")
    check(position.numel() == 1, lambda: "the position of the next token is one number")
    return query.new_empty((*query.shape[:3], values.shape[3]))


_NORM = "Tensor? weight, Tensor? bias, str norm, str format, str rule"

define(f"norm(Tensor x, {_NORM}) -> Tensor", norm, _fake_norm)
define(f"add_norm(Tensor x, Tensor residual, {_NORM}) -> (Tensor, Tensor)", add_norm, _fake_add_norm)
define(
    "gate_product(Tensor gate, Tensor up, str function, str format, str rule) -> Tensor",
    gate_product,
    _fake_gate_product,
)
define(
    "attend_next(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor? cos, Tensor? sin, Tensor? mask, float scale, str? format, str? rule) -> Tensor",
    attend_next,
    _fake_attend_next,
)
