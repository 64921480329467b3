"""llama.cpp itself opens our GGUF files, tokenizes as transformers does and predicts what we predict.

`pip install llama-cpp-python` compiles llama.cpp, in about ten minutes of one core; without it these tests are skipped.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from interop_mixtures import quantized_mixture
from torch.nn import functional as F
from vocabularies import OTHER, TEXTS, byte_level, sentencepiece

import mxcompile
from mxcompile.checkpoint import read_gguf_tokenizer
from mxcompile.checkpoint.interop import gguf_writer
from mxcompile.checkpoint.interop.fused_experts import FusedTensor
from mxcompile.checkpoint.interop.gguf_architectures import settings
from mxcompile.checkpoint.interop.gguf_pretokenizers import PRE_TOKENIZERS
from mxcompile.checkpoint.interop.gguf_tokenizer import TokenizerEntries
from mxcompile.cli import smollm2
from mxcompile.tensor.weight import MXWeight

gguf = pytest.importorskip("gguf", reason="install the test extra")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*llama.cpp takes and returns token ids only:UserWarning"),
]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": ("Llama", {"head_dim": 32}),
    "llama with a tied head": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with another base": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with a tied head": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}

MIXTURES = {
    "mixtral": {},
    "qwen3": {"head_dim": 32},
    "qwen2": {},
    "olmoe": {},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "gpt-oss": {"intermediate_size": 96},
}
"""Changes of the models that `interop_mixtures.py` makes."""


def opened(path, **options):
    """The file in llama.cpp, silently."""
    return llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, **options)


def logits_of_llama_cpp(path, ids):
    model = opened(path)
    model.eval(ids)
    return torch.tensor(np.array(model.scores[: len(ids)]))


def with_8_bit_inputs(model):
    """The model with the inputs of its MXFP4 layers rounded as llama.cpp rounds them: 8-bit integers, blocks of 32."""

    def rounded(module, inputs):
        blocks = inputs[0].unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        integers = torch.where(scale > 0, blocks / scale, 0).round()
        return ((integers * scale.half().float()).flatten(-2),)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and isinstance(module.weight, MXWeight):
            module.register_forward_pre_hook(rounded)
    return model


def distance(actual, expected):
    """Relative to the expected logits, which a constant per token does not change."""
    centered = [values - values.mean(-1, keepdim=True) for values in (actual, expected)]
    return ((centered[0] - centered[1]).norm() / centered[1].norm()).item()


def tiny(name, dtype):
    """A random model whose attention, norms and biases matter."""
    torch.manual_seed(0)
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn_like(parameter) * 0.4 + ("norm" in key)
    ids = torch.randint(0, 128, (1, 24))
    recipe = "lower-mx{weight=mxfp4,activation=none}"
    return mxcompile.quantize_and_compile(model.to(dtype), {"input_ids": ids}, recipe=recipe, compile=False), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_predicts_the_same(name, dtype, tmp_path):
    """Up to the precisions of llama.cpp's own arithmetic: 2 to 3 % of the logits were measured."""
    model, ids = tiny(name, dtype)
    mxcompile.save(model, tmp_path / "model.gguf")
    loaded = with_8_bit_inputs(mxcompile.load(tmp_path / "model.gguf"))
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits[0]
    assert distance(logits_of_llama_cpp(tmp_path / "model.gguf", ids[0].tolist()), expected) < 0.06


def test_a_wrong_order_of_rows_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writer, "permuted", lambda name, value, *_, **__: value)
    model, ids = tiny("llama", torch.float32)
    mxcompile.save(model, tmp_path / "model.gguf")
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    assert distance(logits_of_llama_cpp(tmp_path / "model.gguf", ids[0].tolist()), expected) > 0.2


def mixture_and_ids(name):
    model = quantized_mixture(name, dtype=torch.float32, num_hidden_layers=2, **MIXTURES[name])
    return model, torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_of_experts_predicts_the_same(name, tmp_path):
    """1 to 3 % of the logits were measured; the inputs of experts are rounded by llama.cpp alone."""
    model, ids = mixture_and_ids(name)
    mxcompile.save(model, tmp_path / "model.gguf")
    loaded = with_8_bit_inputs(mxcompile.load(tmp_path / "model.gguf"))
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits[0]
    assert distance(logits_of_llama_cpp(tmp_path / "model.gguf", ids[0].tolist()), expected) < 0.06


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3"])
def test_a_wrong_order_of_gate_and_up_would_be_noticed(name, tmp_path, monkeypatch):
    model, ids = mixture_and_ids(name)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    rows = FusedTensor._rows

    def others(self, out):
        return rows(replace(self, interleaved=not self.interleaved and len(self.projections) > 1), out)

    monkeypatch.setattr(FusedTensor, "_rows", others)
    mxcompile.save(model, tmp_path / "model.gguf")
    assert distance(logits_of_llama_cpp(tmp_path / "model.gguf", ids[0].tolist()), expected) > 0.2


@pytest.mark.parametrize("kind", [*(pre.names[0] for pre in PRE_TOKENIZERS), "sentencepiece"])
def test_text_becomes_the_same_tokens(kind, tmp_path):
    pre = next((known for known in PRE_TOKENIZERS if known.names[0] == kind), None)
    tokenizer = sentencepiece() if pre is None else byte_level(pre, adds_bos=True)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer) + 5, num_hidden_layers=1)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in settings(config, "llama").items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    entries = TokenizerEntries(tokenizer, config.vocab_size)
    entries.add_to(writer, {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert entries.sentences() == ([pre.note] if pre and pre.note else [])
    model = opened(tmp_path / "x.gguf", vocab_only=True)
    assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    for text in TEXTS:
        if entries.sentences() and text == OTHER:  # it has combining marks
            continue
        ids = model.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == tokenizer(text).input_ids, text


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2-135M quantized and written by the command, with its tokenizer."""
    from typer.testing import CliRunner

    from mxcompile.cli.app import app

    if not smollm2.cached_file().exists():
        pytest.skip("SmolLM2 is not in the cache: python -m mxcompile.cli.smollm2")
    path = tmp_path_factory.mktemp("real") / "m.gguf"
    arguments = ["quantize", "smollm2", "--recipe", "w4a16-mxfp-quick", "--length", "64", "--windows", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(path)])
    assert result.exit_code == 0, result.output
    return path


PROMPTS = (
    "The capital of France is",
    "In 2024 there were 12345 people, it's said.\n\n  def f(x):\n\treturn x + 1",
    "<|im_start|>user\nWhat is the sum of 2 and 2?<|im_end|>\n<|im_start|>assistant\n",
)


def test_smollm2_tokens_and_predictions(real):
    """KL of our next-token distributions to llama.cpp's: 0.0038 measured; 0.0029 with its 8-bit inputs, too."""
    tokenizer, original = read_gguf_tokenizer(real), smollm2.load_tokenizer()
    model = opened(real)
    exact, rounded = mxcompile.load(real), with_8_bit_inputs(mxcompile.load(real))
    divergences = {"exact": [], "rounded": []}
    for prompt in PROMPTS:
        ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
        assert ids == original(prompt).input_ids == tokenizer(prompt).input_ids
        theirs = F.log_softmax(logits_of_llama_cpp(real, ids).double(), -1)
        for name, ours in (("exact", exact), ("rounded", rounded)):
            with torch.no_grad():
                expected = F.log_softmax(ours(input_ids=torch.tensor([ids])).logits[0].double(), -1)
            divergences[name] += (expected.exp() * (expected - theirs)).sum(-1).tolist()
    means = {name: sum(values) / len(values) for name, values in divergences.items()}
    assert means["exact"] < 0.01, means
    assert means["rounded"] < means["exact"], means


def test_smollm2_goes_on_as_ours_and_chats(real):
    model, ours, tokenizer = opened(real), mxcompile.load(real), read_gguf_tokenizer(real)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    wanted = tokenizer.decode(ours.generate(**prompt, max_new_tokens=2, do_sample=False)[0])
    text = model(PROMPTS[0], max_tokens=2, temperature=0)["choices"][0]["text"]
    assert PROMPTS[0] + text == wanted
    assert "Paris" in text
    answer = model.create_chat_completion([{"role": "user", "content": "What is 2+2?"}], max_tokens=8, temperature=0)
    assert "4" in answer["choices"][0]["message"]["content"]


def test_smollm2_is_as_small_as_llama_cpp_makes_it(real):
    """The embedding, 28 million values, takes half of what it takes in float32; MX weights 4.25 bits a value."""
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(real).tensors}
    assert types["token_embd.weight"] == "F16"
    assert real.stat().st_size < 116e6
