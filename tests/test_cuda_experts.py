"""On a GPU: mixtures of experts in the planar layout generate what the same MX weights give in float32.

The models are in bfloat16, in which another order of sums may choose another expert, or another token, here and there:
of the tokens that are far from a tie, 95 % are those of the reference, computed for the same text. The device
"cpu" runs the same tests without the GPU's kernels, in some of the cases: `test_experts.py` has them all in float32.
"""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from architectures import causal, made
from chosen_experts import poison, poison_chosen, recorded_choices

import mxcompile
from mxcompile.inductor import compile_module
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.tensor.planar_layout import use_planar_layout
from mxcompile.tensor.weight import MXWeight, unfused_matmuls

WEIGHTS, ACTIVATIONS = RECIPES = ("w4a16-mxfp-quick", "w4a8-mxint-quick")
IMPLEMENTATIONS = ("mx", "eager", "batched_mm", "grouped_mm")
CACHES = (None, "static")
LENGTH, NEW_TOKENS, VOCABULARY = 9, 8, 128
PADDING = {"one": (0,), "batch": (0, 0, 0), "padded": (3, 0, 1), "many": (0,) * 40}
_SIZES = {"head_dim": 64, "hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128, "use_cache": True}
MODELS = {
    "qwen3_moe": {**_SIZES, "num_experts": 16, "num_experts_per_tok": 4},
    "mixtral": {**_SIZES, "num_local_experts": 8},
    "gpt_oss": {**_SIZES, "num_local_experts": 8, "hidden_size": 320, "intermediate_size": 192},  # not whole 128s
}
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
"""Of grouped_mm."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_devices(cases, on_cpu):
    """Parameters for `pytest.mark.parametrize`, the device last: all cases on a GPU, some on the CPU too."""
    on_gpu = [pytest.param(*case, "cuda", marks=needs_gpu) for case in cases]
    return [*on_gpu, *(pytest.param(*case, "cpu", marks=pytest.mark.slow) for case in on_cpu)]


@cache
def deployed(name, recipe, device, layers=2):
    """In the planar layout on a GPU, in the row-major one elsewhere."""
    model = made(causal(name, **MODELS[name], num_hidden_layers=layers)).to(device, torch.bfloat16)
    example = {"input_ids": torch.arange(2 * LENGTH, device=device).reshape(2, LENGTH)}
    module = mxcompile.quantize_and_compile(model, example, recipe=recipe, compile=False)
    module.config.use_cache = True
    use_planar_layout(module)
    experts = [weight for weight in module.parameters() if isinstance(weight, MXWeight) and weight.dim() == 3]
    assert len(experts) == 2 * layers
    assert all((weight.layout_.planes is not None) == (device == "cuda") for weight in experts)
    return module


def with_implementation(name, recipe, device, implementation, layers=2):
    module = copy.deepcopy(deployed(name, recipe, device, layers))
    module.set_experts_implementation(implementation)
    return module


def prompt(kind, device):
    """A prompt with so many padded positions at the left of each row."""
    rows = len(PADDING[kind])
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows)).to(device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING[kind]):
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, arguments, cache, **options):
    """The whole text `[batch, LENGTH + NEW_TOKENS]` and the logits of its new tokens."""
    sizes = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "cache_implementation": cache}
    how = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(**arguments, **sizes, **how, **options)
    return result.sequences, torch.stack(result.logits, 1).float()


@torch.no_grad()
def reference_logits(model, text, mask):
    """Of the new tokens of a text, from the MX weights in float32, by the operators of the lowered Program."""
    model = copy.deepcopy(model).to(torch.float32)
    model.set_experts_implementation("eager")
    mask = torch.cat((mask, mask.new_ones(len(mask), NEW_TOKENS)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with unfused_matmuls():
        return model(text, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, LENGTH - 1 : -1]


def check_generation(model, reference, device, cases, **options):
    """Tokens that are far from a tie are those of the reference, and the same bits come again."""
    sure, equal, errors = [], [], []
    for kind, kept in cases:
        arguments = prompt(kind, device)
        text, logits = generate(model, arguments, kept, **options)
        again, same = generate(model, arguments, kept, **options)
        assert torch.equal(again, text)
        assert torch.equal(same, logits), "other bits on repeat"
        expected = reference_logits(reference, text, arguments["attention_mask"])
        best = expected.topk(2).values
        sure.append(((best[..., 0] - best[..., 1]) > 0.3 * expected.std(-1)).flatten())
        equal.append((text[:, LENGTH:] == expected.argmax(-1)).flatten())
        errors.append(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten())
    is_sure, is_equal, error = torch.cat(sure), torch.cat(equal), torch.cat(errors).median()
    assert is_sure.float().mean() > 0.15
    assert is_equal[is_sure].float().mean() >= 0.95
    assert error < 0.1


@pytest.mark.parametrize(
    ("name", "recipe", "implementation", "device"),
    on_devices(
        product(MODELS, RECIPES, IMPLEMENTATIONS),
        [
            ("qwen3_moe", WEIGHTS, "mx"),
            ("qwen3_moe", ACTIVATIONS, "grouped_mm"),
            ("mixtral", WEIGHTS, "eager"),
            ("mixtral", ACTIVATIONS, "batched_mm"),
            ("gpt_oss", WEIGHTS, "grouped_mm"),
            ("gpt_oss", ACTIVATIONS, "mx"),
        ],
    ),
)
def test_generates(name, recipe, implementation, device):
    module = with_implementation(name, recipe, device, implementation)
    check_generation(module, module, device, product(PADDING, CACHES), disable_compile=True)


@pytest.mark.parametrize(
    ("name", "recipe", "implementation", "kept", "device"),
    on_devices(
        [
            ("qwen3_moe", WEIGHTS, "mx", None),
            *(("qwen3_moe", WEIGHTS, implementation, "static") for implementation in IMPLEMENTATIONS),
            ("mixtral", ACTIVATIONS, "mx", "static"),
            ("gpt_oss", WEIGHTS, "mx", "static"),
            ("gpt_oss", ACTIVATIONS, "grouped_mm", "static"),
        ],
        [("qwen3_moe", WEIGHTS, "batched_mm", "static")],
    ),
)
def test_generates_compiled(name, recipe, implementation, kept, device):
    torch._dynamo.reset()  # it compiles a layer's forward so many times at most, counting those of earlier tests
    module = with_implementation(name, recipe, device, implementation, layers=2 if device == "cuda" else 1)
    prompts = ("one", "padded") if device == "cuda" else ("padded",)
    check_generation(compile_module(copy.deepcopy(module)), module, device, product(prompts, (kept,)))


@pytest.mark.parametrize(("name", "device"), on_devices([("qwen3_moe",), ("gpt_oss",)], [("gpt_oss",)]))
def test_generates_as_transformers_compiles_it(name, device):
    """By itself, on a GPU with a static cache: without our fusion."""
    module = deployed(name, WEIGHTS, device)
    check_generation(copy.deepcopy(module), module, device, [("padded", "static")])


@pytest.mark.parametrize(
    ("name", "implementation", "device"), on_devices(product(["qwen3_moe", "gpt_oss"], IMPLEMENTATIONS), [])
)
@torch.no_grad()
def test_no_expert_is_decoded_that_no_token_chose(name, implementation, device):
    module = with_implementation(name, WEIGHTS, device, implementation)
    arguments = {"input_ids": torch.arange(1, 2, device=device)[None]}
    with recorded_choices(module) as chosen:
        module(**arguments)
    for run in (module, compile_module(copy.deepcopy(module))):
        expected = run(**arguments).logits.clone()
        poison(run, chosen)
        assert sqnr_db(expected, run(**arguments).logits) > 30
        poison_chosen(run, chosen)
        assert not sqnr_db(expected, run(**arguments).logits) > 10
