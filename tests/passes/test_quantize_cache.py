"""quantize-cache: what it rounds and leaves, that one run is generation, and what a rotation of heads saves."""

import re

import pytest
import torch
from models import build, inputs

import mxcompile
from mxcompile.analysis.attentions import find_attentions, with_exact_cache
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import MXCompileError, PipelineError
from mxcompile.formats import FORMATS, MXFP8_E4M3, MXINT4, MXINT8
from mxcompile.graph.agreement import agreement_db
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.ops import CACHED_ATTENTION, DEQUANTIZE
from mxcompile.passes.quantize_cache import QuantizeCache
from mxcompile.pipeline.pipeline import Pipeline

TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
EXPECTED_DB = {
    **{"mxint8": (40, 46), "mxint6": (28, 34), "mxint4": (16, 22), "mxfp8_e4m3": (28, 34)},
    **{"mxfp8_e5m2": (23, 28), "mxfp6_e3m2": (23, 28), "mxfp6_e2m3": (27, 33), "mxfp4": (16, 22)},
}
MIXED = "quantize-cache{key=mxint4,value=mxint4,window=4}"


def run(spec: str, model: torch.nn.Module | str, length: int = 16) -> tuple[mxcompile.Program, mxcompile.Program]:
    """The program before and after a pipeline. A model by name is one of `models.py`."""
    module = build(model) if isinstance(model, str) else model
    ids = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(0))
    before = mxcompile.trace(module, {"input_ids": ids})
    return before, Pipeline.parse(spec).run(before)


def transformers_model(kind: str, **options):
    import transformers

    implementation = options.pop("implementation", None)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **options}, attn_implementation=implementation)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def planted(kind: str = "Llama", **options):
    """A model whose keys and values have an outlying channel in every head."""
    model = transformers_model(kind, head_dim=32, num_key_value_heads=2, **options)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[::32] *= 40
    return model


def logits(program: mxcompile.Program) -> torch.Tensor:
    return program(*program.example.args, **program.example.kwargs).logits


def test_keys_and_values_are_rounded_before_heads_are_repeated():
    before, after = run("quantize-cache{key=mxint8,value=mxint4}", "llama")
    changes = [line for line in mxcompile.print_changes(before, after).splitlines() if "mx." in line]
    assert [line.split("=")[1].split("(")[0].strip() for line in changes] == ["mx.quantize", "mx.dequantize"] * 2
    assert [("'mxint8'" in line, "'mxint4'" in line) for line in changes] == [(True, False)] * 2 + [(False, True)] * 2
    assert all("model.layers.0.self_attn" in line for line in changes)
    for node in after.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        assert tuple(node.meta["val"].shape)[1::2] == (2, 16)  # 2 KV heads of the model's 4
    assert after.cache == CacheFormat(MXINT8, MXINT4)


def test_exact_tokens_make_one_operator():
    before, after = run(MIXED, "llama")
    (node,) = after.graph.find_nodes(op="call_function", target=CACHED_ATTENTION)
    assert node.args[6:] == ("key=mxint4,value=mxint4,window=4", 0)
    assert not find_attentions(after)[0]
    assert not after.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    assert len(find_attentions(before)[0]) == 1


@pytest.mark.parametrize("spec", ["quantize-cache", MIXED, "quantize-cache{key=mxint4,rotate=head}"])
def test_twice_is_once(spec):
    before, after = run(spec, planted())
    again = Pipeline.parse(spec).run(after)
    assert (after.ledger[-1].rewrites, again.ledger[-1].rewrites) == (1, 0)
    assert mxcompile.print_changes(after, again) == ""
    assert again.cache == after.cache
    assert before.cache is None


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("size", [64, 80, 128])
def test_every_format_and_head_dimension(fmt, size):
    _, after = run(f"quantize-cache{{key={fmt},value={fmt}}}", transformers_model("Llama", head_dim=size))
    (numbers,) = after.ledger[-1].numbers.values()
    assert numbers["bytes_per_token"] == 4 * 2 * fmt.storage_bytes(1, size)
    low, high = EXPECTED_DB[str(fmt)]
    assert low < numbers["key_sqnr_db"] < high
    assert low < numbers["value_sqnr_db"] < high


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen2", {"num_key_value_heads": 2}),  # biases of keys
        ("Qwen3", {"head_dim": 32, "num_key_value_heads": 2}),  # norms of queries and keys
        ("Gemma2", {"head_dim": 16, "num_key_value_heads": 2}),  # decomposed, with capped scores
        ("Llama", {"implementation": "eager", "num_key_value_heads": 2}),
        ("Bloom", {"hidden_size": 64, "n_layer": 1, "n_head": 4}),  # decomposed, with a bias for positions
        # decomposed, with sinks
        ("GptOss", {"head_dim": 16, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_attention_of_every_kind_is_found(kind, options):
    before, after = run("quantize-cache{key=mxfp8,value=mxfp8}", transformers_model(kind, **options))
    assert after.ledger[-1].rewrites == 1
    assert after.ledger[-1].misses == ()
    assert 15 < agreement_db({"y": logits(before)}, {"y": logits(after)})[0] < 90


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_latents_of_keys_and_values_stay_float(implementation):
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    model = transformers_model(
        "DeepseekV3", implementation=implementation, first_k_dense_replace=1, num_key_value_heads=4, **sizes
    )
    program = run("quantize-cache", model)[1]
    (miss,) = program.ledger[-1].misses
    assert "its keys and values are made of a latent of all heads" in miss.reason
    assert program.cache is None


def test_encoders_have_no_cache():
    (miss,) = run("quantize-cache", "bert")[1].ledger[-1].misses
    assert "every token attends to later ones, so generation has no cache of it" in str(miss)


def test_a_sliding_window_stays_exact():
    record = run("quantize-cache", _gemma3())[1].ledger[-1]
    assert record.rewrites == 1
    (miss,) = record.misses
    assert miss.where.endswith("model.layers.0.self_attn")
    assert "a sliding window of 8 tokens, whose cache is small and stays exact" in miss.reason


def _gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**{**TINY, "num_hidden_layers": 2}, head_dim=16, sliding_window=8, layer_types=kinds)
    return Gemma3ForCausalLM(config).eval()


class Masked(torch.nn.Module):
    """Attention written by hand, with `masked_fill` and grouped heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128)
        self.q, self.k, self.v = (torch.nn.Linear(64, size, bias=False) for size in (64, 32, 32))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        batch, tokens = input_ids.shape
        q, k, v = (layer(hidden).view(batch, tokens, -1, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(-2, -1)) / 4
        hidden_keys = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden_keys, float("-inf")).softmax(-1)
        return self.head((weights @ v).transpose(1, 2).reshape(batch, tokens, 64))


def test_decomposed_attention_has_exact_tokens():
    """As the fused one; without its cache a program has the model's own operators, to the last bit."""
    models = [transformers_model("Llama", num_key_value_heads=2, implementation=name) for name in ("eager", "sdpa")]
    before, after = run(MIXED, models[0])
    assert after.ledger[-1].rewrites == 1
    torch.testing.assert_close(logits(after), logits(run(MIXED, models[1])[1]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(after), logits(before))
    assert torch.equal(logits(with_exact_cache(after)), logits(before))


def test_attention_written_by_hand():
    model = Masked().eval()
    before, after = run(MIXED, model)
    assert after.ledger[-1].rewrites == 1
    ids = before.example.kwargs["input_ids"]
    assert torch.equal(with_exact_cache(after)(input_ids=ids), model(ids))
    whole = after(input_ids=ids)
    assert agreement_db({"y": model(ids)}, {"y": whole})[0] < 60
    torch.testing.assert_close(after(input_ids=ids[:, :9]), whole[:, :9], rtol=1e-4, atol=1e-5)


def test_capped_scores_have_no_exact_tokens():
    model = transformers_model("Gemma2", head_dim=16, num_key_value_heads=2, implementation="eager")
    record = run(MIXED, model)[1].ledger[-1]
    assert record.rewrites == 0
    assert "load the model with sdpa as its attention" in record.misses[0].reason


@pytest.mark.parametrize("option", ["window=-1", "prompt=-2", "rotate=all", "key=mxfp8_e4m3+aligned"])
def test_wrong_options_are_named(option):
    with pytest.raises((PipelineError, MXCompileError), match="aligned" if "+" in option else option.partition("=")[0]):
        Pipeline.parse(f"quantize-cache{{{option}}}")


SHIFTED = "quantize-cache{key=mxint4,value=mxint4,shift=mean,prompt=8}"


@pytest.mark.parametrize("spec", ["quantize-cache{key=mxint4,value=mxint4}", MIXED, SHIFTED])
def test_one_run_over_a_text_is_generation(spec):
    """The logits of the last token do not depend on later tokens, nor on how much is read at once."""
    _, after = run(spec, planted())
    ids = inputs("llama")["input_ids"][:1].repeat(1, 3)[:, :24]
    whole = after(input_ids=ids).logits
    for length in (9, 16, 23):
        part = after(input_ids=ids[:, :length]).logits
        torch.testing.assert_close(part, whole[:, :length], rtol=1e-4, atol=1e-4)


def test_a_prompt_is_read_exactly():
    before, after = run("quantize-cache{key=mxint4,value=mxint4,prompt=10}", planted())
    expected, actual = logits(before), logits(after)
    torch.testing.assert_close(actual[:, :10], expected[:, :10], rtol=1e-4, atol=1e-4)
    assert (actual[:, 10:] - expected[:, 10:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_outlying_channels_are_rotated(kind):
    """Values of both kinds of layers, with and without biases: the weights compute the same, and less is lost."""
    before, plain = run("quantize-cache{key=mxint4,value=mxint4}", planted(kind))
    _, rotated = run("quantize-cache{key=mxint4,value=mxint4,rotate=head}", planted(kind))
    assert rotated.cache == CacheFormat(MXINT4, MXINT4, rotate=True)
    assert rotated.ledger[-1].misses == ()
    exact = with_exact_cache(rotated)
    assert agreement_db({"y": logits(before)}, {"y": logits(exact)})[0] > 100
    (numbers,), (others,) = rotated.ledger[-1].numbers.values(), plain.ledger[-1].numbers.values()
    assert numbers["rotated_keys_over_plain"] < 0.9
    assert numbers["rotated_values_over_plain"] < 0.9
    assert numbers["score_sqnr_db"] > others["score_sqnr_db"]
    assert numbers["value_sqnr_db"] > others["value_sqnr_db"]
    names = list(before.parameter_names())
    changed = {name.split(".")[-2] for name in names if not torch.equal(rotated.stored(name), before.stored(name))}
    assert changed == {"v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
        ("GPT2", {"n_embd": 64, "n_layer": 1, "n_head": 4}),  # queries, keys and values of one matmul
    ],
)
def test_a_bias_of_keys_costs_no_bits(kind, options):
    """It changes no weight of a softmax; behind a rotary embedding it does, and stays."""
    model = transformers_model(kind, **options)
    biases = {name: bias for name, bias in model.named_parameters() if name.endswith(("k_proj.bias", "c_attn.bias"))}
    (name,) = biases
    keys = slice(64, 128) if kind == "GPT2" else slice(None)
    with torch.no_grad():
        biases[name].copy_(torch.arange(len(biases[name])) % 7 - 3.0)
        biases[name][keys] *= 10
    kept = biases[name].clone()
    before, after = run("quantize-cache{key=mxint4,value=none}", model)
    expected = kept.clone()
    expected[keys] = 0
    assert torch.equal(after.stored(name), expected)
    assert torch.equal(biases[name], kept)
    assert agreement_db({"y": logits(before)}, {"y": logits(with_exact_cache(after))})[0] > 100
    assert agreement_db({"y": logits(before)}, {"y": logits(after)})[0] > 25
    rotary = transformers_model("Qwen2", num_key_value_heads=2)
    with torch.no_grad():
        rotary.model.layers[0].self_attn.k_proj.bias.fill_(5.0)
    _, after = run("quantize-cache{key=mxint4,value=none}", rotary)
    assert torch.equal(after.stored("model.layers.0.self_attn.k_proj.bias"), torch.full((32,), 5.0))


@pytest.mark.parametrize("rotate", ["none", "head"])
def test_a_shift_takes_out_what_all_keys_share(rotate):
    """A bias on channels that a rotary embedding turns slowly is nearly the same behind it."""
    model = transformers_model("Qwen2", head_dim=32, num_key_value_heads=2)
    with torch.no_grad():
        bias = model.model.layers[0].self_attn.k_proj.bias.zero_()
        bias[15::16] = 8.0
    before, plain = run(f"quantize-cache{{key=mxint4,value=none,window=1,rotate={rotate}}}", model)
    _, shifted = run(f"quantize-cache{{key=mxint4,value=none,shift=mean,rotate={rotate}}}", model)
    assert shifted.cache is not None
    assert shifted.cache.shift
    errors = [agreement_db({"y": logits(before)}, {"y": logits(after)})[0] for after in (plain, shifted)]
    assert errors[1] > errors[0] + 6
    assert agreement_db({"y": logits(before)}, {"y": logits(with_exact_cache(shifted))})[0] > 100


def test_values_are_rotated_before_weights_are_rounded():
    spec = "lower-mx{weight=mxint8} | quantize-cache{key=mxint4,value=mxint4,rotate=head}"
    record = run(spec, planted())[1].ledger[-1]
    assert record.rewrites == 1
    assert "is rounded: put quantize-cache in front of the passes that round weights" in str(record.misses)


def test_measures_compare_with_the_model_whose_values_are_rotated():
    """v_proj gives rotated values, and o_proj takes them: nothing is lost there."""
    program = mxcompile.trace(planted(), {"input_ids": torch.arange(32).reshape(2, 16)})
    pipeline = Pipeline.parse("quantize-cache{key=mxint4,value=mxint4,rotate=head}")
    (record,) = pipeline.run(program, None, [mxcompile.Measure()]).ledger
    layers = {
        name.removesuffix(".weight").split(".")[-1]: layer
        for name, layer in record.measured.layers.items()
        if "self_attn" in name
    }
    assert min(layers[name].local_db for name in ("v_proj", "o_proj")) > 80
    assert 10 < layers["o_proj"].accumulated_db < 40
    assert 10 < record.measured.output_db < 60


def test_without_outliers_nothing_is_rotated():
    record = run("quantize-cache{key=mxint4,value=mxint4,rotate=head}", transformers_model("Llama", head_dim=32))[1]
    assert record.cache == CacheFormat(MXINT4, MXINT4)
    misses = record.ledger[-1].misses
    assert [miss.where for miss in misses[:1]] == ["all layers"]
    assert all("would save less than 10%" in miss.reason for miss in misses)


def test_rotations_that_do_not_pay_are_one_miss():
    model = transformers_model("Llama", head_dim=32, num_key_value_heads=2, num_hidden_layers=3)
    spec = "quantize-cache{key=none,value=mxint4,rotate=head}"
    assert [miss.where for miss in run(spec, model)[1].ledger[-1].misses] == ["all layers"]
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[::32] *= 40
    (miss,) = run(spec, model)[1].ledger[-1].misses
    assert re.fullmatch(r".*model\.layers\.0\.self_attn.* and another layer", miss.where)


@pytest.mark.parametrize("spec", ["quantize-cache{key=mxint4,value=mxint4,rotate=head}", MIXED])
def test_deploy_stores_the_format_and_leaves_forward_alone(spec):
    model = planted()
    _, after = run(f"{spec} | lower-mx{{weight=mxint8}}", model)
    deployed = mxcompile.deploy(after, model)
    provenance = Provenance.of(deployed)
    assert provenance is not None
    assert provenance.cache == after.cache
    expected = logits(with_exact_cache(after))
    actual = deployed(*after.example.args, **after.example.kwargs, use_cache=False).logits
    assert agreement_db({"y": expected}, {"y": actual})[0] > 80


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_without_its_cache_a_program_has_the_models_own_attention(kv_heads, padded):
    """To the last bit: behind it, inputs rounded to few bits magnify every difference."""
    model = transformers_model("Llama", num_key_value_heads=kv_heads, num_hidden_layers=2)
    batch = {"input_ids": torch.arange(32).reshape(2, 16)}
    if padded:
        batch["attention_mask"] = torch.ones(2, 16, dtype=torch.long)
        batch["attention_mask"][0, :5] = 0
    before = mxcompile.trace(model, batch)
    after = Pipeline.parse("quantize-cache{key=mxint4,value=mxint4,window=4}").run(before)
    assert after.graph.find_nodes(op="call_function", target=CACHED_ATTENTION)
    assert not torch.equal(logits(after), logits(before))
    assert torch.equal(logits(with_exact_cache(after)), logits(before))


def test_the_format_is_kept_in_a_checkpoint(tmp_path):
    model = planted()
    _, after = run("quantize-cache{value=mxint4,window=8} | lower-mx{weight=mxint8}", model)
    mxcompile.save(mxcompile.deploy(after, model), tmp_path / "saved")
    provenance = Provenance.of(mxcompile.load(tmp_path / "saved"))
    assert provenance is not None
    assert provenance.cache == CacheFormat(MXINT8, MXINT4, 8)
    assert '"cache": "key=mxint8,value=mxint4,window=8"' in (tmp_path / "saved" / "config.json").read_text()


def test_the_users_model_is_untouched():
    model = planted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run("quantize-cache{key=mxint4,value=mxint4,rotate=head}", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_text_form():
    assert str(QuantizeCache()) == "quantize-cache"
    spec = "quantize-cache{key=mxfp8_e4m3,value=none,window=32,rotate=head}"
    (step,) = Pipeline.parse(spec).passes
    assert step == QuantizeCache(MXFP8_E4M3, None, 32, rotate="head")
    assert str(step) == spec
