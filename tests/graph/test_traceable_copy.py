"""What is traced in place of the model: arguments that no signature names are traced, no configuration asks for a
cache, and experts are grouped matmuls, while the user's configuration is as it was.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import build, inputs, output
from torch import Tensor, nn

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.errors import ArgumentError, InputError, TraceError
from mxcompile.graph.inputs import Inputs, as_inputs
from mxcompile.graph.program import module_path
from mxcompile.graph.trace import exported_program, trace
from mxcompile.graph.traceable_copy import traceable_copy
from mxcompile.tensor.weight import MXWeight

# Arguments


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


class Keywords(Mixed):
    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        return self.linear(x) + options["offset"]


class Positions(Mixed):
    def forward(self, *values: Tensor) -> Tensor:
        return self.linear(values[0]) + values[1]


class Both(Mixed):
    def forward(self, x: Tensor, /, *more: dict[str, Tensor], **options: list[Tensor]) -> Tensor:
        return self.linear(x) + more[0]["a"] + options["x"][0]


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.module(*args, **kwargs)


def x(batch: int = 2, length: int = 4) -> Tensor:
    return torch.randn(batch, length, 8)


@pytest.mark.parametrize(
    ("model", "call", "names"),
    [
        (Keywords(), lambda *s: {"x": x(*s), "offset": x(*s)}, ["x", "offset"]),
        (Keywords(), lambda *s: {"offset": x(*s), "x": x(*s)}, ["offset", "x"]),
        (Keywords(), lambda *s: Inputs((x(*s),), {"offset": x(*s)}), ["x", "offset"]),
        (Positions(), lambda *s: (x(*s), x(*s)), ["values_0", "values_1"]),
        (Both(), lambda *s: Inputs((x(*s), {"a": x(*s)}), {"x": [x(*s)]}), ["x_", "more_0_a", "x_0"]),
        (Wrapper(Wrapper(Keywords())), lambda *s: {"x": x(*s), "offset": x(*s)}, ["x", "offset"]),
        (nn.DataParallel(Keywords()), lambda *s: {"x": x(*s), "offset": x(*s)}, ["x", "offset"]),
    ],
    ids=["keyword", "order", "by position", "positions", "nested", "wrapped", "DataParallel"],
)
def test_arguments_that_the_signature_does_not_name(model, call, names):
    program = trace(model, call())
    assert [node.name for node in program.graph.find_nodes(op="placeholder")] == names
    longer = as_inputs(call(3, 7))
    assert torch.equal(program(*longer.args, **longer.kwargs), model(*longer.args, **longer.kwargs))


def test_they_are_exported():
    program = exported_program(Wrapper(Keywords()), as_inputs({"x": x(), "offset": x()}))
    assert program.module()(x=x(3, 7), offset=x(3, 7)).shape == (3, 7, 8)


def test_a_keyword_that_is_missing_behind_the_wrapper():
    with pytest.raises(InputError, match=r"Wrapper itself fails on the example inputs .*KeyError: 'offset'"):
        trace(Wrapper(Keywords()), {"x": x()})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about a name that peft reads
def test_a_peft_model():
    peft = pytest.importorskip("peft")
    model = peft.PeftModel(build("llama"), peft.LoraConfig(target_modules=["q_proj"])).eval()
    program = trace(model, inputs("llama"))
    longer = inputs("llama", 3, 11)
    torch.testing.assert_close(output(program(**longer)), output(model(**longer)), rtol=0, atol=1e-5)


# Configurations


class Cached(nn.Module):
    """Returns what no graph can, if any of its configurations asks for a cache."""

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(use_cache=True)
        self.config = SimpleNamespace(
            use_cache=True, text_config=text, parts={"decoder": SimpleNamespace(use_cache=True)}
        )
        self.decoder = nn.Linear(8, 8)
        self.decoder.config = text

    def configs(self) -> list[SimpleNamespace]:
        return [self.config, self.config.text_config, self.config.parts["decoder"]]

    def forward(self, x: Tensor, branch: bool = False) -> object:
        if branch and x.sum() > 0:
            return x
        asks = [config.use_cache for config in (*self.configs(), self.decoder.config)]
        return (self.decoder(x), object()) if any(asks) else self.decoder(x)


def test_no_part_of_a_configuration_asks_for_a_cache():
    model = Cached()
    assert torch.equal(trace(model, x())(x=(value := x())), model.decoder(value))
    assert all(config.use_cache for config in model.configs())
    with pytest.raises(TraceError):
        trace(model, {"x": x(), "branch": True})
    assert all(config.use_cache for config in model.configs())


@pytest.mark.slow
def test_a_vision_language_model():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, num_hidden_layers=2, **sizes),
        text_config=LlamaConfig(vocab_size=128, num_key_value_heads=2, num_hidden_layers=1, **sizes),
        image_token_index=127,
        image_token_id=127,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 126, (2, 12))
    ids[:, 1:5] = 127
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}
    program = trace(model, example)
    torch.testing.assert_close(output(program(**example)), output(model(**example)), rtol=0, atol=1e-5)
    assert model.config.text_config.use_cache


# Experts


def as_traced(model: nn.Module) -> list[tuple[str, str, tuple[str, ...]]]:
    """Where, what and what else each matmul of the traced graph reads, and what stays float."""
    choice = choose(trace(model, inputs("mixtral")))
    matmuls = [(m.module_path, m.parameter, (str(m.node.target),)) for m in choice.matmuls]
    return matmuls + [(module_path(each.node), each.reason, each.weights) for each in choice.skipped]


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits


def test_experts_are_traced_as_grouped_matmuls():
    """Also by a loop that reads values, which no graph can hold; the model goes on as it was."""
    expected = as_traced(build("mixtral"))
    assert sum("grouped_mm" in what for _, _, (what, *_) in expected) == 2
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = build("mixtral")
        model.set_experts_implementation(implementation)
        assert as_traced(model) == expected
        assert model.get_experts_implementation() == {"": implementation}
        assert model.model.layers[0].mlp.experts.config is model.config
        within = [path.removeprefix("model.") for path, *_ in as_traced(Wrapped(model))]
        assert set(within) == {path for path, *_ in expected}
        assert model.get_experts_implementation() == {"": implementation}


def test_a_quantized_model_is_the_same_whatever_its_experts_are_computed_with():
    packed: list[dict[str, MXWeight]] = []
    for implementation in ("eager", "grouped_mm"):
        model = build("mixtral")
        model.set_experts_implementation(implementation)
        quantized = mxcompile.quantize_and_compile(model, inputs("mixtral"), recipe="w8a8-mxfp-quick", compile=False)
        packed.append({name: p for name, p in quantized.named_parameters() if isinstance(p, MXWeight)})
    assert packed[0].keys() == packed[1].keys()
    assert "model.layers.0.mlp.experts.down_proj" in packed[0]
    for one, other in zip(packed[0].values(), packed[1].values(), strict=True):
        assert torch.equal(one.elements, other.elements)
        assert torch.equal(one.scales, other.scales)


def test_a_model_without_experts_keeps_its_own_way():
    model = build("llama")
    assert model.get_experts_implementation() == {"": "eager"}
    copied = traceable_copy(model, as_inputs(inputs("llama")))
    assert copied.get_experts_implementation() == {"": "eager"}


# What cannot be traced


class Experts(nn.Module):
    """A loop over experts; `hit` says how it skips those that no token chose."""

    def __init__(self, hit) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.hit = hit

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen, y = self.router(rows).argmax(-1), torch.zeros_like(rows)
        for index in self.hit(chosen):
            (row,) = torch.where(chosen == index)
            y = y.index_add(0, row, self.experts[index](rows[row]))
        return y


@pytest.mark.parametrize(
    "hit",
    [
        lambda chosen: chosen.unique(),
        lambda chosen: [index for index in range(3) if (chosen == index).any()],
        lambda chosen: [index for index in range(3) if len(torch.where(chosen == index)[0])],
        lambda chosen: [index for index, count in enumerate(chosen.bincount(minlength=3).tolist()) if count],
    ],
    ids=["those chosen", "if any", "if rows", "if counted"],
)
def test_a_loop_that_asks_whether_an_expert_has_tokens(hit):
    message = (
        r"in the top module \(Experts\), line \d+ of its forward: .*data-dependent.*In a loop over experts, run each "
        r"on the tokens that chose it, also if there are none: .*torch\.nn\.functional\.grouped_mm"
    )
    with pytest.raises(TraceError, match=message) as raised:
        trace(Experts(hit), x())
    assert "torch.cond" not in str(raised.value)
    model = Experts(lambda chosen: range(3))
    assert torch.equal(trace(model, x())(value := x(3, 7)), model(value))


def refused(model: object, example: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(model, example)


def in_a_dict(collected: list[object]) -> Any:
    store: dict[str, Tensor] = {}
    return lambda *values: (store.update(last=values[-1]), collected.append(store["last"]))[0]


def in_an_object(collected: list[object]) -> Any:
    holder = SimpleNamespace(collected=collected)
    return lambda *values: holder.collected.append(values[-1])


def in_a_variable(collected: list[object]) -> Any:
    last = None

    def hook(*values: object) -> None:
        nonlocal last
        collected.extend([] if last is None else [last])
        last = values[-1]

    return hook


@pytest.mark.parametrize("hook_into", [in_a_dict, in_an_object, in_a_variable])
def test_a_hook_that_collects_activations(hook_into):
    """What it collects while the model is traced, in place of tensors with values, is not the user's."""
    collected: list[object] = []
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)).eval()
    model[0].register_forward_hook(hook_into(collected))
    trace(model, x())
    assert collected == []
    made = mxcompile.quantize_and_compile(model, x(), recipe="w8a8-mxint-quick", compile=False)
    made(x()), made(x())
    assert collected
    assert {type(value) for value in collected} == {Tensor}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_is_no_plain_module():
    with pytest.raises(ArgumentError, match=r"^trace: model is a function; give a torch\.nn\.Module$"):
        trace(lambda x: x, x())
    refused(
        torch.compile(nn.Linear(8, 8), backend="eager"), x(), r"is the result of torch\.compile: .* model\._orig_mod"
    )
    scripted = torch.jit.trace(nn.Linear(8, 8), x())
    refused(scripted, x(), "the model is a ScriptModule")
    refused(nn.Sequential(nn.Linear(8, 8), scripted), x(), "1 is a ScriptModule, which has no Python code")


def test_a_module_without_shapes():
    refused(nn.Sequential(nn.LazyLinear(8)), x(), r"^0\.weight has no shape yet \(a lazy module\): run the model once")


def test_weights_without_values():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].to("meta")
    refused(model, x(), r"1\.weight, 1\.bias of the model is on the meta device and has no values .*device_map=None")
    refused(model.to("meta"), x(), r"0\.weight, 0\.bias, 1\.weight and 1 more of the model is on the meta device")
    program = trace(model, x().to("meta"))  # to explain a model, values are not needed
    with pytest.raises(
        InputError, match=r"0\.weight, 0\.bias, 1\.weight and 1 more of the model is on the meta device"
    ):
        mxcompile.recipes()["w8a8-mxint-quick"].run(program)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_modules_that_share_their_work_with_other_processes():
    from torch.distributed.fsdp import fully_shard

    parallel = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    refused(parallel, x(), r"^the model is in a DistributedDataParallel: pass the module inside it \(model\.module\)$")
    refused(nn.Sequential(parallel), x(), r"^0 is in a DistributedDataParallel: .* \(model\.0\.module\)$")
    sharded = fully_shard(nn.Linear(8, 8), mesh=dist.init_device_mesh("cpu", (1,)))
    refused(sharded, x(), r"^weight is sharded, so that each process has a part of it .*quantize the model before it")


def test_inputs_that_are_no_tensors():
    model = nn.Embedding(8, 8)
    refused(model, {"input": [[1, 2]]}, r'Input input is a list of numbers: a tokenizer .* return_tensors="pt"')
    refused(model, {"input": torch.tensor([[1]]).numpy()}, r"example input input is a ndarray: .* torch\.from_numpy")


def test_strides_of_the_example_are_no_guards():
    model = nn.Linear(8, 8)
    program = trace(model, torch.randn(8, 4, 2).transpose(0, 2))
    for other in (torch.randn(3, 5, 8), torch.randn(8, 5, 3).transpose(0, 2), torch.randn(8).expand(4, 2, 8)):
        assert torch.equal(program(other), model(other))


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_model_that_accelerate_moves_while_it_runs_is_refused(tmp_path, where):
    """device_map: parts of it have no values, or are elsewhere than their inputs, until they run."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    device_map = {"0": "cpu", "1": where}
    model = accelerate.dispatch_model(model, device_map, "cpu", offload_dir=tmp_path, force_hooks=True)
    assert model(x()).shape == (2, 4, 8)
    refused(model, x(), r"accelerate moves tensors of .* when it runs \(device_map\).*device_map=None.*--low-memory")


def test_a_model_that_accelerate_placed_on_one_device_is_not_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(nn.Linear(8, 8).eval(), {"": "cpu"})
    assert trace(model, x()).has_tensor("weight")
