"""Mixtures of experts work wherever their float model does, whichever way transformers calls their experts.

Models are those of the zoo, tiny and in float32. Tokens are compared up to the first near tie: one of the two best
logits may win by a rounding error of either side. What weights alone are quantized for is the dequantized model; what
rounds activations, whose roundings may flip, is compared with the operators of the lowered Program one by one.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from architectures import causal, made, sizes
from chosen_experts import poison, poison_chosen, recorded_choices
from models import output
from torch import Tensor, nn
from zoo_models import build, inputs

import mxcompile
from mxcompile.inductor import compile_module, why_no_inductor
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.tensor.weight import MXWeight, unfused_matmuls

WEIGHTS, ACTIVATIONS = RECIPES = ("w4a16-mxfp-quick", "w4a8-mxint-quick")
IMPLEMENTATIONS = ("mx", "eager", "batched_mm", "grouped_mm")
ONE_IMPLEMENTATION = ("llama4", "jetmoe")
"""Models whose experts transformers does not switch."""
MANY_EXPERTS = (*product(("qwen3_moe", "gpt_oss"), IMPLEMENTATIONS), ("llama4", "eager"))
"""Of these, the first has experts `[E, out, in]`, the others `[E, in, out]`. Llama-4 multiplies every token by every
expert, of which those that it did not choose get zeros."""
COMPILED = (*zip(("qwen3_moe", "gpt_oss") * 2, IMPLEMENTATIONS, strict=True), ("llama4", "eager"))
ONE_LAYER = {"qwen3_moe": {"num_hidden_layers": 1}, "gpt_oss": {"num_hidden_layers": 1}}
"""What is compiled has one layer of experts; Llama-4 has them in every other layer."""
MODELS = (
    *("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe"),
    *("ernie4_5_moe", "glm4_moe", "phimoe", "jamba", "nemotron_h", *ONE_IMPLEMENTATION),
)
LLAMA4 = {"attention_chunk_size": 4, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2}
CACHES = (None, "static")
NO_COMPILER = why_no_inductor(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
PROMPTS = ("one", "batch", "padded")
LENGTH, NEW_TOKENS = 8, 6


@dataclass(frozen=True)
class Quantized:
    """A model in float, its lowered Program, and what it is deployed as."""

    model: nn.Module
    lowered: mxcompile.Program
    deployed: nn.Module


@cache
def quantized(name, recipe):
    model = build(name)
    model.config.use_cache = True
    lowered = mxcompile.recipes()[recipe].run(mxcompile.trace(model, inputs(name), allow_partial=True))
    return Quantized(model, lowered, mxcompile.deploy(lowered, model))


@cache
def many_experts(name):
    """A deployed model with 16 experts, of which a token chooses two."""
    model_type, more = ("llama4_text", LLAMA4) if name == "llama4" else (name, ONE_LAYER[name])
    counts = {key: 16 for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in sizes(model_type)}
    model = made(causal(model_type, **counts, **more))
    model.config.use_cache = True
    return mxcompile.quantize_and_compile(model, inputs(name), recipe=WEIGHTS, compile=False)


def implementations(name):
    return ("eager",) if name in ONE_IMPLEMENTATION else IMPLEMENTATIONS


def with_implementation(module, implementation):
    """A copy of the module that calls its experts that way; its weights are the same tensors."""
    twin = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
    if twin._can_set_experts_implementation():
        twin.set_experts_implementation(implementation)
    return twin


def prompt(name, kind):
    """Keyword arguments of `generate`: one text, three, or three of other lengths with padding on the left."""
    arguments = inputs(name, batch=1 if kind == "one" else 3, length=LENGTH, seed=3)
    for row, padding in enumerate((3, 0, 1) if kind == "padded" else ()):
        arguments["attention_mask"][row, :padding] = 0
    return arguments


def generate(model, arguments, cache, **options):
    """The new tokens `[batch, NEW_TOKENS]` and their logits `[batch, NEW_TOKENS, vocabulary]`, of greedy decoding."""
    sizes = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "cache_implementation": cache}
    how = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(**arguments, **sizes, **how, **options)
    return result.sequences[:, -NEW_TOKENS:], torch.stack(result.logits, 1)


def share_of_other_tokens(expected, tokens, tie):
    """The first other token of a row is one whose two best logits differ by less than `tie` of their deviation.

    Returns the share of tokens that are others.
    """
    wanted, logits = expected
    best = logits.topk(2).values
    is_tie = (best[..., 0] - best[..., 1]) < tie * logits.std(-1)
    differs = tokens != wanted
    assert not (differs & (differs.cumsum(1) == 1) & ~is_tie).any()
    return differs.float().mean().item()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_implementation_has_the_logits_of_the_lowered_program(name, recipe):
    case = quantized(name, recipe)
    sizes = {} if name == "jamba" else {"batch": 3, "length": 12}  # Jamba is traced at its size
    example = inputs(name, **sizes, seed=1)
    expected = output(case.lowered(**example))
    for implementation in implementations(name):
        module = with_implementation(case.deployed, implementation)
        assert sqnr_db(expected, output(module(**example))) > (100 if recipe == WEIGHTS else 50), implementation
    with unfused_matmuls():
        assert sqnr_db(expected, output(case.deployed(**example))) > 100
    if recipe == WEIGHTS:
        dequantized = copy.deepcopy(case.deployed).dequantize()
        assert sqnr_db(expected, output(dequantized(**example))) > 100


def _combinations(half):
    """Half of all combinations of a prompt, a cache and an implementation, with every pair of values."""
    everything = product(enumerate(PROMPTS), enumerate(CACHES), enumerate(IMPLEMENTATIONS))
    return [(kind, cache, way) for (p, kind), (c, cache), (w, way) in everything if (p + c + w) % 2 == half]


KINDS_OF_EXPERTS = ("qwen3_moe", "gpt_oss", "llama4", "jetmoe", "nemotron_h")
"""Models whose experts have another layout or gate each."""
OTHER_HALVES = [
    pytest.param(name, *of, marks=pytest.mark.slow)
    for name in KINDS_OF_EXPERTS
    for of in ((WEIGHTS, 1), (ACTIVATIONS, 0))
]


@pytest.mark.parametrize(
    ("name", "recipe", "half"),
    [*((name, WEIGHTS, 0) for name in MODELS), *((name, ACTIVATIONS, 1) for name in KINDS_OF_EXPERTS), *OTHER_HALVES],
)
def test_generates_the_same_tokens(name, recipe, half):
    """Greedy decoding in half of all combinations gives the tokens of the reference."""
    case = quantized(name, recipe)
    dequantized = copy.deepcopy(case.deployed).dequantize() if recipe == WEIGHTS else case.deployed

    @cache
    def expected(kind, kept):
        with nullcontext() if recipe == WEIGHTS else unfused_matmuls():
            return generate(dequantized, prompt(name, kind), kept)

    others = []
    for kind, kept, implementation in _combinations(half):
        tokens, _ = generate(with_implementation(case.deployed, implementation), prompt(name, kind), kept)
        others.append(share_of_other_tokens(expected(kind, kept), tokens, 1e-3 if recipe == WEIGHTS else 2e-2))
    assert sum(others) / len(others) < 0.2


@pytest.mark.parametrize(("name", "implementation"), MANY_EXPERTS)
def test_no_expert_is_decoded_that_no_token_chose(name, implementation):
    """Their scales are NaN, as is everything that is computed with them."""
    module = with_implementation(copy.deepcopy(many_experts(name)), implementation)
    arguments = inputs(name, batch=1, length=1)
    with recorded_choices(module) as chosen:
        _, expected = generate(module, arguments, None)
    poison(module, chosen)
    assert torch.equal(generate(module, arguments, None)[1], expected)
    poison_chosen(module, chosen)
    assert not generate(module, arguments, None)[1].isfinite().all()


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # of grouped_mm
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")  # Llama-4
@pytest.mark.parametrize(("name", "implementation"), COMPILED)
@torch.no_grad()
def test_a_compiled_model_decodes_no_expert_that_no_token_chose(name, implementation):
    module = with_implementation(copy.deepcopy(many_experts(name)), implementation)
    example = {**inputs(name, batch=1, length=2), "use_cache": False}
    with recorded_choices(module) as chosen:
        plain = output(module(**example))
    compiled = compile_module(copy.deepcopy(module))
    expected = output(compiled(**example))
    assert sqnr_db(plain, expected) > 80
    poison(compiled, chosen)
    assert sqnr_db(expected, output(compiled(**example))) > 80  # of a second graph, where the first one breaks
    poison_chosen(compiled, chosen)
    assert not output(compiled(**example)).isfinite().all()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "recipe"), [("qwen3_moe", ACTIVATIONS), ("gpt_oss", WEIGHTS)])
@pytest.mark.parametrize("kept", CACHES)
def test_a_compiled_model_generates_the_same_tokens(name, recipe, kept):
    model = made(causal(name, **ONE_LAYER[name]))
    model.config.use_cache = True
    plain = mxcompile.quantize_and_compile(model, inputs(name), recipe=recipe, compile=False)
    compiled = compile_module(copy.deepcopy(plain))
    for kind in PROMPTS:
        arguments = prompt(name, kind)
        expected = generate(plain, arguments, kept)
        assert share_of_other_tokens(expected, generate(compiled, arguments, kept)[0], 2e-2) < 0.5


class AllAtOnce(nn.Module):
    """Eight experts in one parameter: every token is multiplied by all of them, and the results of two are added."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 8)
        self.weight = nn.Parameter(torch.randn(8, 64, 96) / 8)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        of_all = torch.zeros(x.shape[0], 8).scatter(1, chosen, weights)
        return ((x.expand(8, -1, -1) @ self.weight) * of_all.T[..., None]).sum(0)


class InALoop(nn.Module):
    """Experts that are modules: each runs on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            row, column = torch.where(chosen == index)
            y = y.index_add(0, row, expert(x[row]) * weights[row, column, None])
        return y


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", [AllAtOnce, InALoop])
@torch.no_grad()
def test_experts_written_by_hand(kind, recipe):
    model, x = kind().eval(), torch.randn(6, 64)
    lowered = mxcompile.recipes()[recipe].run(mxcompile.trace(model, x))
    deployed = mxcompile.deploy(lowered, model)
    assert any(isinstance(weight, MXWeight) and "router" not in name for name, weight in deployed.named_parameters())
    for tokens in (x, torch.randn(11, 64), x[:1]):
        assert sqnr_db(lowered(tokens), deployed(tokens)) > 100
