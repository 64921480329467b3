"""Engines of vLLM on tiny mixtures of experts, in one process and in several, against transformers."""

import engines
import pytest
import torch
from interop_mixtures import mixture, routers
from torch import nn

import mxcompile

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
IDS = engines.prompts(length=40)
MOST = 3  # times the distance of the float model
SIZES = {"hidden_size": 256, "vocab_size": engines.VOCABULARY, "num_hidden_layers": 2, "head_dim": 64}
INNER = 160  # five blocks
KINDS = {
    "gpt-oss": {"num_local_experts": 8, "intermediate_size": INNER, "sliding_window": 32},
    "mixtral": {"num_local_experts": 8, "intermediate_size": INNER},
    "qwen2": {"num_experts": 8, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": 128},
    "qwen3": {"num_experts": 8, "moe_intermediate_size": INNER},
}
FORMATS = {
    "gpt-oss": "weight=mxint4,activation=mxint8",
    "mixtral": "weight=mxint4,activation=mxint8",
    "qwen2": "weight=mxfp4,activation=none",
    "qwen3": "weight=mxfp4,activation=none",
}
TENSOR_PARALLEL = {"tensor_parallel_size": 2}
EXPERT_PARALLEL = {**TENSOR_PARALLEL, "enable_expert_parallel": True}
PIPELINE_PARALLEL = {"pipeline_parallel_size": 2, "enforce_eager": False}
"""Not eager: vLLM 0.32 on a CPU then fails in the second process, with a float model too."""
KV_CACHE = {"kv_cache_dtype": "fp8"}


class Kind:
    """A float model and the distance of vLLM from it."""

    def __init__(self, name: str, folder) -> None:
        self.model = mixture(name, **{**SIZES, **KINDS[name]})
        with torch.no_grad():
            for path, weight in self.model.named_parameters():
                is_inner = weight.dim() > 1 and "layers" in path
                weight.mul_(0.12 if is_inner else 0.25 if weight.dim() > 1 else 1)
            for router in routers(self.model):  # whose choice is clear: rounding does not change it
                self.model.get_submodule(router).weight.mul_(32)
        self.folder, self.recipe = folder, f"lower-mx{{{FORMATS[name]}}}"
        self.model.save_pretrained(folder)
        self.distance = distance(folder, self.model)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    made: dict[str, Kind] = {}

    def get(name):
        if name not in made:
            made[name] = Kind(name, tmp_path_factory.mktemp("float") / "model")
        return made[name]

    return get


def distance(folder, model: nn.Module, **options) -> float:
    """The mean distance of the engine's log-probabilities of the prompts from transformers'."""
    expected = engines.expected(model, IDS, model.config._attn_implementation)  # gpt-oss has eager attention alone
    return (engines.log_probabilities(folder, IDS, **options) - expected).abs().mean().item()


def quantized(kind: Kind, folder, **options) -> nn.Module:
    model = mxcompile.quantize_and_compile(kind.model, {"input_ids": IDS}, recipe=kind.recipe, compile=False, **options)
    mxcompile.save(model, folder)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("gpt-oss", TENSOR_PARALLEL, id="gpt-oss-tp2"),
        pytest.param("mixtral", {"tensor_parallel_size": 4}, id="mixtral-tp4, with uneven shares"),
        pytest.param("qwen2", EXPERT_PARALLEL, id="qwen2-ep2, with a quantized shared_expert_gate"),
        pytest.param("qwen3", PIPELINE_PARALLEL, id="qwen3-pp2, compiled"),
    ],
)
def test_a_quantized_mixture_runs_as_in_transformers(name, options, kinds, tmp_path):
    kind = kinds(name)
    model = quantized(kind, tmp_path / "model")
    actual = distance(tmp_path / "model", model, **options)
    print(f"distance of {name} {options}: {actual:.4f}, of the float model: {kind.distance:.4f}")
    assert actual <= MOST * kind.distance


def test_experts_that_stayed_float_run_with_quantized_layers(kinds, tmp_path):
    kind = kinds("gpt-oss")
    names = [*routers(kind.model), "lm_head", "*.experts"]
    model = quantized(kind, tmp_path / "model", exclude=names, allow_partial=True)
    actual = distance(tmp_path / "model", model)
    print(f"distance with float experts: {actual:.4f}, of the float model: {kind.distance:.4f}")
    assert actual <= MOST * kind.distance


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="vLLM needs AVX-512 for it"
)
def test_the_fp8_cache_of_vllm_works_beside_quantized_weights(kinds, tmp_path):
    kind = kinds("qwen3")
    model = quantized(kind, tmp_path / "model")
    actual, of_float = distance(tmp_path / "model", model, **KV_CACHE), distance(kind.folder, kind.model, **KV_CACHE)
    print(f"distance with an fp8 cache: {actual:.4f}, of the float model with one: {of_float:.4f}")
    assert kind.distance < of_float
    assert actual <= MOST * of_float
