"""LoRA of peft on a quantized model: trained, saved and loaded by peft, merged into packed weights."""

import warnings

import pytest
import torch
from models import build, inputs, output

import mxcompile
from mxcompile.errors import InputError, TrainingError, WeightError
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that transformers renamed
ROTATED = (
    "awq-fold{weight=mxint8} | rotate{weight=mxint8,activation=mxint8} | lower-mx{weight=mxint8,activation=mxint8}"
)
WUSH = "rotate{weight=mxint8,activation=mxint8,kind=wush} | lower-mx{weight=mxint8,activation=mxint8}"


def adapted(recipe="w8a8-mxint", name="llama", **options):
    x = inputs(name)
    quantized = mxcompile.quantize_and_compile(build(name), x, recipe=recipe, calibration=[x], compile=False)
    torch.manual_seed(0)
    targets = ["c_fc", "c_attn"] if name == "gpt2" else ["q_proj", "down_proj"]
    how = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2", **options)
    return peft.get_peft_model(quantized, how)


def logits(model, x):
    with torch.no_grad():
        return output(model.eval()(**x))


def train(model, x, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels, losses = x["input_ids"], []
    for _ in range(steps):
        loss = model(**x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_train_through_every_layer_with_and_without_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        model, x = adapted(init_lora_weights=False).train(), inputs("llama")
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(**x, labels=x["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, again = gradients
    assert len(plain) == 4
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_gives_adapters_the_same_gradients():
    gradients = []
    for compiled in (False, True):
        model, x = adapted(init_lora_weights=False), inputs("llama")
        if compiled:
            mxcompile.compile_module(model.base_model.model)
        model.train()(**x, labels=x["input_ids"]).loss.backward()
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    for actual, expected in zip(*gradients[::-1], strict=True):
        assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_the_loss_falls_and_packed_weights_stay():
    model, x = adapted(), inputs("llama")
    packed = {n: p.elements.clone() for n, p in model.named_parameters() if isinstance(p, MXWeight)}
    losses = train(model, x)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(model.get_parameter(name).elements, value) for name, value in packed.items())


def test_adapters_are_saved_and_loaded_in_pefts_format(tmp_path):
    model, x = adapted(), inputs("llama")
    train(model, x, steps=2)
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("adapter_*")} == {"adapter_config.json", "adapter_model.safetensors"}
    fresh = mxcompile.quantize_and_compile(build("llama"), x, recipe="w8a8-mxint", compile=False)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, str(tmp_path)), x), expected)


def test_state_in_memory_is_the_packed_bytes_and_16_bytes_a_trained_value():
    model, x = adapted(), inputs("llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    base = stored_bytes(model) - 4 * size  # packed weights, and what stays float
    optimizer = torch.optim.AdamW(trained)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(**x, labels=x["input_ids"]).loss
    loss.backward()
    optimizer.step()
    state = sum(v.numel() * v.element_size() for each in optimizer.state.values() for v in each.values() if v.dim())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    assert stored_bytes(model) + gradients + state == base + 16 * size
    linears = {p.shape for p in model.parameters() if isinstance(p, MXWeight)}
    linears |= {torch.Size(reversed(shape)) for shape in linears}
    own = {value.data_ptr() for value in model.parameters()}  # the output head is float
    decoded = [tensor for tensor in kept if tensor.is_floating_point() and tensor.shape in linears]
    assert not [tensor.shape for tensor in decoded if tensor.data_ptr() not in own]


@pytest.mark.parametrize(("recipe", "name"), [("w8a8-mxint", "llama"), (ROTATED, "llama"), ("w8a8-mxint", "gpt2")])
def test_merged_adapters_compute_nearly_the_same(recipe, name):
    model, x = adapted(recipe, name), inputs(name)
    train(model, x)
    with_adapters = logits(model, x)
    with model.disable_adapter():
        without = logits(model, x)
    result = mxcompile.merge_adapters(model, [x])
    assert len(result.merged) == 2
    assert result.kl_after < 0.02 * result.kl_before
    assert str(result).startswith("2 layers merged and rounded again; KL from the model with adapters: ")
    assert not [n for n, _ in result.model.named_parameters() if "lora_" in n]
    assert all(isinstance(result.model.get_submodule(n).weight, MXWeight) for n in result.merged)
    merged = logits(result.model, x)
    assert (merged - with_adapters).norm() < 0.1 * (without - with_adapters).norm()


def test_a_float_layer_is_merged_by_peft():
    x = inputs("llama")
    quantized = mxcompile.quantize_and_compile(build("llama"), x, recipe="w8a8-mxint", compile=False)
    how = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(quantized, how)
    expected = logits(model, x)
    result = mxcompile.merge_adapters(model)
    assert result.kl_before is None
    assert "give batches" in str(result)
    assert (logits(result.model, x) - expected).norm() < 0.05 * expected.norm()


def test_adapters_that_rounding_undoes_are_warned_of():
    model, x = adapted("w4a16-mxint-quick", init_lora_weights=False), inputs("llama")
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data *= 1e-2
    with pytest.warns(UserWarning, match="rounding has undone the adapters. Keep them beside the quantized model"):
        result = mxcompile.merge_adapters(model, [x])
    assert result.kl_after >= result.kl_before


def test_gptq_keeps_more_of_adapters_than_rounding_to_nearest():
    """Measured in 4 bits: a KL of 0.0032 from the model with adapters rounded to nearest, 0.0028 by GPTQ."""
    batches = [inputs("llama", 4, 32, seed=seed) for seed in range(4)]
    results = []
    for gptq in (False, True):
        model = adapted("w4a16-mxint-quick", init_lora_weights=False)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data *= 0.3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # both may be undone
            results.append(mxcompile.merge_adapters(model, batches, gptq=gptq))
    nearest, by_gptq = results
    assert by_gptq.kl_before == nearest.kl_before
    assert by_gptq.kl_after < 0.95 * nearest.kl_after
    with pytest.raises(InputError, match="gptq=True rounds by what the layers' inputs are: give batches"):
        mxcompile.merge_adapters(adapted(), gptq=True)


@pytest.mark.parametrize("recipe", [WUSH])
def test_inputs_that_are_transformed_by_matrices(recipe):
    x = inputs("llama", 4, 32)
    model = adapted(recipe, init_lora_weights=False)
    matrices = [m for m in model.modules() if isinstance(getattr(m, "weight", None), MXWeight)]
    assert any(m.weight.multiplier is not None and m.weight.multiplier.dim() == 3 for m in matrices)
    result = mxcompile.merge_adapters(model, [x])
    assert result.kl_after < 0.05 * result.kl_before


def test_what_cannot_be_merged_is_named_and_nothing_has_changed():
    with pytest.raises(TrainingError, match="has no LoRA adapters"):
        mxcompile.merge_adapters(build("llama"))
    model = adapted(name="gpt2", lora_bias=True)
    expected = logits(model, inputs("gpt2"))
    with pytest.raises(TrainingError, match="a bias of LoRA in its adapter 'default', which no packed weight"):
        mxcompile.merge_adapters(model)
    assert torch.equal(logits(model, inputs("gpt2")), expected)
    model = adapted()
    with pytest.raises(InputError, match="batches"):
        mxcompile.merge_adapters(model, [])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(WeightError, match=r"q_proj hold NaN or Inf, .* smaller learning rate"):
        mxcompile.merge_adapters(model)


def test_a_prepared_model_with_adapters_is_not_finished():
    x = inputs("llama")
    prepared = mxcompile.prepare_training(build("llama"), x, "w4a4-mxfp-quick")
    model = peft.get_peft_model(prepared, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="has adapters of peft"):
        mxcompile.finish_training(model)
