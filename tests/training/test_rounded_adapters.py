"""L4Q: LoRA of peft inside the rounding of a prepared model, merged without a loss."""

import copy

import pytest
import torch
from models import build, inputs, output

import mxcompile
from mxcompile.errors import TrainingError
from mxcompile.tensor.weight import unfused_matmuls

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that transformers renamed
QUICK = "w4a4-mxfp-quick"
PREPARED_INPUT = (
    "awq-fold{weight=mxfp4} | rotate{weight=mxfp4,activation=mxfp4} | lower-mx{weight=mxfp4,activation=mxfp4}"
)


def prepared(name="llama", recipe=QUICK):
    x = inputs(name)
    return mxcompile.prepare_training(build(name), x, recipe, calibration=[x])


def adapted(name="llama", recipe=QUICK, **options):
    torch.manual_seed(0)
    targets = ["c_fc", "c_attn"] if name == "gpt2" else ["q_proj", "o_proj", "down_proj"]
    how = {"r": 4, "target_modules": targets, "fan_in_fan_out": name == "gpt2", **options}
    return peft.get_peft_model(prepared(name, recipe), peft.LoraConfig(**how))


def logits(model, x):
    with torch.no_grad(), unfused_matmuls():
        return output(model.eval()(**x))


def train(model, x, steps=6):
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(values, lr=1e-2), []
    for _ in range(steps):
        loss = model(**x, labels=x["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "recipe"), [("llama", QUICK), ("llama", PREPARED_INPUT), ("gpt2", QUICK)])
def test_the_merged_and_deployed_model_is_the_trained_one_to_the_bit(name, recipe):
    x = inputs(name)
    model = adapted(name, recipe)
    before = logits(model, x)
    assert mxcompile.round_adapters(model) is model
    assert torch.equal(logits(model, x), before)  # adapters begin at zero
    floats = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model.train(), x)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(model.get_parameter(n), value) for n, value in floats.items())
    trained = logits(model, x)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), before)
    assert torch.equal(logits(copy.deepcopy(model), x), trained)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, x), trained)
    assert torch.equal(logits(mxcompile.finish_training(merged), x), trained)


def test_every_adapter_has_a_gradient_also_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        model, x = mxcompile.round_adapters(adapted(init_lora_weights=False)).train(), inputs("llama")
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(**x, labels=x["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_adapters_are_saved_and_loaded_in_pefts_format(tmp_path):
    model, x = mxcompile.round_adapters(adapted()), inputs("llama")
    train(model.train(), x, steps=2)
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(prepared(), str(tmp_path))
    assert torch.equal(logits(mxcompile.round_adapters(fresh), x), expected)
    fresh.merge_adapter()
    assert torch.equal(logits(fresh, x), expected)
    fresh.unmerge_adapter()
    torch.testing.assert_close(logits(fresh, x), expected, rtol=0, atol=0.3)
    assert torch.equal(logits(fresh.unload(), x), logits(prepared(), x))


def test_an_adapter_beside_the_rounding_is_not_merged_without_a_word():
    """peft would write into values that are computed anew each time."""
    model = adapted(init_lora_weights=False)
    with pytest.raises(TrainingError, match=r"what is written to it is lost: .*\(mxcompile\.round_adapters, before"):
        model.merge_and_unload()
    with pytest.raises(TrainingError, match=r"has adapters of peft: finish what merge_and_unload\(\) returns"):
        mxcompile.finish_training(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "such as DoRA"), ({"lora_dropout": 0.1}, "dropout"), ({"lora_bias": True}, "a bias of LoRA")],
)
def test_what_no_rounded_weight_can_hold_is_named(options, reason):
    name = "gpt2" if "lora_bias" in options else "llama"
    with pytest.raises(TrainingError, match=rf"{reason}.* in its adapter 'default', which no rounded weight can hold"):
        mxcompile.round_adapters(adapted(name, **options))


def test_models_without_such_adapters_are_named():
    with pytest.raises(TrainingError, match="has no LoRA adapter on a weight that rounds"):
        mxcompile.round_adapters(prepared())
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="has no LoRA adapter on a weight that rounds"):
        mxcompile.round_adapters(model)
