"""deploy: a copy of the user's module with MX weights computes the same as the lowered program."""

import copy
import importlib
import re

import pytest
import torch
from models import LANGUAGE_MODELS, MODELS, build, inputs, output
from torch import nn
from torch.nn import functional as F

import mxcompile
from mxcompile import Pipeline
from mxcompile.analysis.folds.groups import find_groups, fold
from mxcompile.analysis.folds.multiplier import insert_multiplier
from mxcompile.analysis.layers import find_layers
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.checkpoint.hf.cached_forward import cache_of, reading_its_cache
from mxcompile.deploy import deploy
from mxcompile.errors import DeployError
from mxcompile.formats import MXINT8
from mxcompile.graph.agreement import agreement_db
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.recipes import RECIPES
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight

CACHED = [name for name, pipeline in RECIPES.items() if "quantize-cache" in pipeline]


def quantized(name, recipe="w4a8-mxint-quick", **options):
    model, example = build(name), inputs(name)
    program = mxcompile.trace(model, example, **options)
    lowered = mxcompile.recipes()[recipe].run(program)
    return model, example, lowered, mxcompile.deploy(lowered, model)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in CACHED])
def test_every_recipe_agrees_with_its_lowered_program(recipe):
    """Equal: both run the same operators on the same operands."""
    _, example, lowered, deployed = quantized("llama", recipe)
    with torch.no_grad():
        assert torch.equal(output(deployed(**example)), output(lowered(**example)))


@pytest.mark.parametrize("recipe", CACHED)
def test_recipes_with_a_cache_agree_once_their_cache_is_read(recipe):
    """To a few roundings of inputs, as attention may sum in another order. The text is longer than exact windows."""
    _, _, lowered, deployed = quantized("llama", recipe)
    example = inputs("llama", length=48)
    with torch.no_grad():
        expected, plain = output(lowered(**example)), output(deployed(**example))
        with reading_its_cache(deployed, cache_of(deployed)):
            actual = output(deployed(**example))
    assert agreement_db({"logits": expected}, {"logits": actual})[0] > 45
    assert agreement_db({"logits": expected}, {"logits": plain})[0] < 40


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_agrees_with_its_lowered_program(name):
    model, example, lowered, deployed = quantized(name)
    assert type(deployed) is type(model)
    with torch.no_grad():
        assert torch.equal(output(deployed(**example)), output(lowered(**example)))
        longer = inputs(name, batch=3, length=11, seed=1)
        assert torch.equal(output(deployed(**longer)), output(lowered(**longer)))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_only_the_output_head_embeddings_and_routers_stay_float(name):
    _, _, _, deployed = quantized(name)
    float_matrices = [n for n, p in deployed.named_parameters() if p.dim() > 1 and not isinstance(p, MXWeight)]
    routers = ["model.layers.0.mlp.gate.weight"] if name == "mixtral" else []
    assert [n for n in float_matrices if not re.search("embed|wte|wpe|lm_head", n)] == routers


class OneOfSeveral(nn.Module):
    """A loop over the experts of one parameter, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 64, 64) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (F.linear(x, self.up[index]).relu() for index in range(3))
        return sum(h @ weight for h, weight in zip(hidden, self.down, strict=True))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in CACHED])
def test_one_of_several_weights_in_a_parameter(recipe):
    """Packed as one, whatever a recipe learns; a rotation or a multiplier would have to be that of all of them."""
    model, x = OneOfSeveral().eval(), torch.randn(2, 5, 64)
    lowered = mxcompile.recipes()[recipe].run(mxcompile.trace(model, x), [x])
    assert lowered.ledger[-1].misses == ()
    deployed = mxcompile.deploy(lowered, model)
    assert sqnr_db(model(x).detach(), deployed(x)) > (20 if "8a" in recipe.partition("-")[0] else 8)
    assert all(isinstance(weight, MXWeight) and weight.dim() == 3 for weight in (deployed.up, deployed.down))
    longer = torch.randn(3, 7, 64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(longer), lowered(longer), rtol=1e-5, atol=1e-5)


def test_folds_reach_the_norms_of_the_module():
    model, example = build("llama"), inputs("llama")
    program = Pipeline.parse(f"smooth-quant | {RECIPES['w8a8-mxint-quick']}").run(mxcompile.trace(model, example))
    deployed = mxcompile.deploy(program, model)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(deployed.get_parameter(name), program.tensor(name))
    assert not torch.equal(deployed.get_parameter(name), model.get_parameter(name))


def test_nothing_is_shared_and_nothing_of_the_model_changes():
    model, example = build("llama-tied"), inputs("llama-tied")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = mxcompile.recipes()["w4a8-mxint-quick"].run(mxcompile.trace(model, example))
    deployed = mxcompile.deploy(lowered, model)
    with torch.no_grad():
        for parameter in deployed.parameters():
            if not isinstance(parameter, MXWeight):
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not deployed.training
    assert model.config.use_cache
    assert deployed.config.use_cache


def test_a_tied_head_can_be_quantized_alone_or_with_its_embedding():
    alone = quantized("llama-tied", include=["lm_head"])[3]
    assert isinstance(alone.lm_head.weight, MXWeight)
    assert not isinstance(alone.model.embed_tokens.weight, MXWeight)
    both = quantized("llama-tied", include=["lm_head", "model.embed_tokens"])[3]
    assert isinstance(both.model.embed_tokens.weight, MXWeight)
    assert both.model.embed_tokens.weight.elements.data_ptr() == both.lm_head.weight.elements.data_ptr()
    assert stored_bytes(both) < stored_bytes(quantized("llama-tied")[3]) < stored_bytes(alone)


def test_a_tied_parameter_that_a_pass_has_changed_stays_one():
    model = build("llama-tied")
    program = mxcompile.trace(model, inputs("llama-tied"))
    (name,) = program.aliases.keys() & set(program.parameter_names())
    program.set_tensor(name, program.tensor(name) * 2)
    deployed = mxcompile.deploy(mxcompile.recipes()["w4a8-mxint-quick"].run(program), model)
    assert torch.equal(deployed.lm_head.weight, model.lm_head.weight * 2)
    assert deployed.lm_head.weight is deployed.model.embed_tokens.weight


def test_packed_bytes_in_memory():
    """14 % of float32 for the quantized part: 4.25 of 32 bits."""
    model, _, _, deployed = quantized("mlp")
    matrices = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 2)
    assert stored_bytes(model) - stored_bytes(deployed) == matrices * (1 - 4.25 / 32)


class Gated(nn.Module):
    """Three linears and a residual read a GELU."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        h = F.gelu(x)
        return h + self.q(h) * self.k(h) + self.v(h)


def multiplied(model, x, lower="lower-mx{weight=mxint4,activation=mxint8}", **options):
    """The lowered program of a model with a multiplier before its first matmuls, with factors folded in."""
    program = mxcompile.trace(model, x, **options)
    matmuls = find_matmuls(program)[0]
    product = insert_multiplier(program, [m for m in matmuls if m.activation is matmuls[0].activation])
    groups = find_groups(program, find_matmuls(program)[0])[0]
    for group in groups:
        if group.value is product:
            fold(program, group, torch.exp2(torch.linspace(-3, 3, group.count).to(x.dtype).round()))
    return Pipeline.parse(lower).run(program)


@pytest.mark.parametrize("lower", ["lower-mx{weight=mxint4,activation=mxint8}", "lower-mx{weight=mxint4}"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multipliers_travel_with_the_weights(lower, dtype):
    model, x = Gated().to(dtype).eval(), torch.randn(6, 64, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = multiplied(model, x, lower)
    deployed = mxcompile.deploy(lowered, model)
    wanted = lowered.tensor("q.weight_input_multiplier")
    with torch.no_grad():
        for module in (deployed, copy.deepcopy(deployed)):
            assert torch.equal(module(x), lowered(x))
            assert all(torch.equal(part.weight.multiplier, wanted) for part in (module.q, module.k, module.v))
        assert torch.equal(torch.export.export(deployed, (x,), strict=False).module()(x), lowered(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() == deployed.state_dict().keys()


def test_a_deployed_multiplier_follows_a_cast():
    """The factors are powers of two, which bfloat16 holds."""
    model, x = Gated().eval(), torch.randn(3, 64)
    deployed = mxcompile.deploy(multiplied(model, x), model)
    wanted = copy.deepcopy(deployed.q.weight.multiplier)
    deployed.to(torch.bfloat16)
    assert deployed.q.weight.multiplier.dtype == torch.bfloat16
    assert torch.equal(deployed.q.weight.multiplier.float(), wanted)
    assert deployed(x.bfloat16()).dtype == torch.bfloat16


def test_a_user_s_own_multiply_stays_where_it_is():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("scale", torch.rand(64))

        def forward(self, x):
            return self.linear(x * self.scale)

    model, x = Scaled(), torch.randn(2, 64)
    plain = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(mxcompile.trace(model, x))
    deployed = mxcompile.deploy(plain, model)
    assert deployed.linear.weight.multiplier is None
    assert torch.equal(deployed(x), plain(x))
    lowered = multiplied(model, x)
    assert torch.equal(mxcompile.deploy(lowered, model)(x), lowered(x))


def test_a_multiplied_matmul_that_stays_float_is_refused():
    model, x = Gated().eval(), torch.randn(3, 64)
    lowered = multiplied(model, x, exclude=["k"])
    with pytest.raises(DeployError, match=r"%linear_1 in k reads a multiplied input, but its weight stays float"):
        mxcompile.deploy(lowered, model)


def test_a_float_program_is_refused():
    model = build("mlp")
    with pytest.raises(DeployError, match=r"this one is float: end the pipeline with lower-mx"):
        mxcompile.deploy(mxcompile.trace(model, inputs("mlp")), model)


def test_another_model_is_refused():
    _, _, lowered, _ = quantized("mlp")
    with pytest.raises(DeployError, match=r"'up.weight'.*deploy into the model that was traced"):
        mxcompile.deploy(lowered, nn.Linear(3, 4))


class Twice(nn.Module):
    """One linear on two values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(torch.sigmoid(self.linear(x)))


def test_one_parameter_with_two_multipliers_is_refused():
    model, x = Twice(), torch.randn(2, 64)
    program = mxcompile.trace(model, x)
    for matmul in find_matmuls(program)[0]:
        insert_multiplier(program, [matmul])
    lowered = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(program)
    assert torch.equal(mxcompile.deploy(lowered, model)(x), lowered(x))  # both are ones
    lowered.set_tensor("linear.weight_input_multiplier_2", torch.full((64,), 2.0))
    with pytest.raises(DeployError, match=r"'linear.weight' is used in two ways: .*multiplier='\w+'.*multiplier='\w+'"):
        mxcompile.deploy(lowered, model)
    with pytest.raises(DeployError, match=r"'linear.weight' is used in two ways: .*multiplier='\w+'.*multiplier=None"):
        mxcompile.deploy(multiplied(model, x), model)


def test_one_parameter_in_two_formats_is_refused():
    model, x = Twice(), torch.randn(2, 64)
    lowered = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(mxcompile.trace(model, x))
    assert torch.equal(mxcompile.deploy(lowered, model)(x), lowered(x))
    second = lowered.graph.find_nodes(op="call_function", target=torch.ops.mx.quantize.default)[1]
    second.update_arg(1, "mxint6")
    with pytest.raises(DeployError, match=r"'linear.weight' is used in two ways"):
        mxcompile.deploy(lowered, model)


def test_a_module_that_does_something_else_than_its_trace_is_found_out():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.flip = False

        def forward(self, x):
            y = self.linear(x)
            return -y if self.flip else y

    model, x = Moody(), torch.randn(2, 64)
    lowered = Pipeline.parse("lower-mx{weight=mxint4}").run(mxcompile.trace(model, x))
    model.flip = True
    with pytest.raises(DeployError, match=r"output 0 .* agrees with the lowered program's only to"):
        mxcompile.deploy(lowered, model)


@pytest.mark.parametrize("agrees", [True, False])
def test_other_kernels_of_attention_are_told_from_other_functions(monkeypatch, agrees):
    """Outputs that differ are compared again with the math backend of SDPA in both models."""
    model, example = build("llama"), inputs("llama")
    lowered = mxcompile.recipes()["w4a8-mxint-quick"].run(mxcompile.trace(model, example))
    plain: list[bool] = []

    def measured(wanted, given):
        assert torch.equal(wanted["logits"], given["logits"])
        plain.append(not torch.backends.cuda.flash_sdp_enabled())
        return (60.0 if plain[-1] and agrees else 25.0), "logits"

    monkeypatch.setattr(importlib.import_module("mxcompile.deploy"), "agreement_db", measured)
    if agrees:
        mxcompile.deploy(lowered, model)
    else:
        with pytest.raises(DeployError, match=r"only to 25\.0 dB"):
            mxcompile.deploy(lowered, model)
    assert plain == [False, True]


class Stateful(nn.Module):
    """Counts its calls, and keeps its last activations: one buffer is written to, one through a view."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 96))
        self.steps = 0

    def forward(self, x):
        self.calls += 1
        self.steps = self.steps + 1
        h = self.up(x).relu()
        self.last[0].copy_(h[0])
        return self.down(h) + self.calls


@pytest.mark.parametrize("recipe", ["w8a8-mxint-quick", "smooth-quant | lower-mx{weight=mxint8,activation=mxint8}"])
def test_state_is_that_of_the_users_module(recipe):
    """Tracing, calibrating and checking run the model; the result has not run, and neither has the user's module."""
    model, batches = Stateful().eval(), [torch.randn(4, 64) for _ in range(3)]
    model.calls += 7
    deployed = mxcompile.quantize_and_compile(model, batches[0], recipe=recipe, calibration=batches, compile=False)
    for module in (model, deployed):
        assert (module.calls.item(), module.last.abs().max().item(), module.steps) == (7, 0, 0)
    assert sqnr_db(model(batches[1]), deployed(batches[1])) > 30
    assert deployed.calls.item() == 8
    assert model.calls.item() == 8


class Clamped(nn.Module):
    """Writes to its input, and to a part of it."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.up, self.down = shift, nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        x.clamp_(-1, 1)
        x[:, :8] += self.shift
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("recipe", ["w8a8-mxint-quick", "smooth-quant | lower-mx{weight=mxint8,activation=mxint8}"])
def test_inputs_are_the_users(shift, recipe, tmp_path):
    """What forward writes to its inputs it writes to copies, wherever mxcompile runs it."""
    model, batches = Clamped(shift).eval(), [torch.randn(4, 64) * 3 for _ in range(2)]
    kept = [batch.clone() for batch in batches]
    deployed = mxcompile.quantize_and_compile(
        model, batches[0], recipe=recipe, calibration=batches, compile=False, dump=tmp_path / "dump"
    )
    assert all(torch.equal(batch, before) for batch, before in zip(batches, kept, strict=True))
    assert sqnr_db(model(kept[0].clone()), deployed(kept[0].clone())) > 30


class OddNames(nn.Module):
    """Parameters called as a lowered program calls packed bytes; one of them is not read by forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64) / 8)
        self.w_elements = nn.Parameter(torch.randn(64, 64) / 8)
        self.w_scales = nn.Parameter(torch.randn(64))
        self.w__scales = nn.Parameter(torch.randn(64))
        self.w_elements_elements = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.w, self.w_scales), self.w_elements, self.w__scales)


def test_parameters_with_the_names_of_packed_bytes(tmp_path):
    model, x = OddNames(), torch.randn(4, 64)
    program = Pipeline([LowerMX(MXINT8)]).run(mxcompile.trace(model, x))
    result = deploy(program, model)
    assert [name for name, tensor in result.named_parameters() if isinstance(tensor, MXWeight)] == ["w", "w_elements"]
    assert list(find_layers(program)) == ["w", "w_elements"]
    for name in ("w_scales", "w__scales", "w_elements_elements"):
        assert torch.equal(result.get_parameter(name), model.get_parameter(name))
    assert sqnr_db(model(x), result(x)) > 35
    mxcompile.save(result, tmp_path / "saved")
    again = mxcompile.load(tmp_path / "saved", model=OddNames())
    assert torch.equal(again(x), result(x))


@pytest.mark.parametrize("part", ["linear", "norm"])
def test_shapes_are_checked_without_a_comparison_of_outputs(part):
    """A model of the same structure and another size."""

    def net(size):
        return nn.Sequential(nn.LayerNorm(64 if part == "linear" else size), nn.Linear(64, size))

    program = Pipeline([LowerMX(MXINT8)]).run(mxcompile.trace(net(64), torch.randn(4, 64)))
    name, shapes = ("1.weight", r"\[96, 64\].*\[64, 64\]") if part == "linear" else ("0.weight", r"\[96\].*\[64\]")
    other = net(96)
    if part == "norm":
        other[1] = nn.Linear(64, 64)
    with pytest.raises(DeployError, match=f"the module's '{name}' is {shapes}: deploy into the model that was traced"):
        deploy(program, other, check=False)


def test_bytes_of_a_module_without_storage():
    """Tensors on the meta device have no address to tell them apart by."""
    tied = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Linear(64, 64, device="meta"))
    tied[1].weight = tied[0].weight
    assert stored_bytes(tied) == (64 + 2) * 64 * 4
    *_, deployed = quantized("mlp")
    assert stored_bytes(copy.deepcopy(deployed).to("meta")) == stored_bytes(deployed)
