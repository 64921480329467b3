"""The rule of every public call: nothing of the user's model or example inputs is written, or shared with a result.

What a result reaches is found by the garbage collector's own references, through closures, attributes and C objects.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
import torch
from models import MODELS, build, inputs
from torch import Tensor, nn
from torch.nn import functional as F

import mxcompile
from mxcompile.graph.program import Program
from mxcompile.tensor.weight import MXWeight

_ENDS = (type, ModuleType, CodeType, FrameType)
RECIPE = "w8a8-mxint-quick"


class Patched(nn.Module):
    """Functions on instances, hooks, and tensors and modules that are not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        plain, gate = self.down.forward, torch.ones(128)
        self.down.forward = lambda x: plain(x * gate)
        self.up.register_forward_hook(lambda module, args, result: result + module.bias)
        self.function = lambda x: x + self.down.bias
        self.table, self.parts = [torch.ones(64)], {"extra": nn.LayerNorm(64)}
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(self.down(F.relu(self.up(self.parts["extra"](x) * self.table[0]))))


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, in training mode and with gradients, and its inputs; one that counts its calls if it is `patched`."""
    if name != "patched":
        return build(name).train(), inputs(name)
    torch.manual_seed(0)
    return Patched().train(), inputs("mlp")


def reached(root: object) -> Iterator[Tensor]:
    """Tensors that an object reaches; the globals of functions are code."""
    seen = {id(vars(module)) for module in list(sys.modules.values())}
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, _ENDS):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield from value.parts if isinstance(value, MXWeight) else (value,)
        stack += gc.get_referents(value)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def untouched(*owned: Any) -> Iterator[set[int]]:
    """The memory of what the user owns; its tensors, attributes and modes are the same to the bit afterwards."""
    models = [value for value in owned if isinstance(value, nn.Module)]
    tensors = [tensor for value in owned for tensor in reached(value)]
    kept = [tensor.detach().clone() for tensor in tensors]
    attributes = [(m, {k: repr(v) for k, v in vars(m).items()}) for model in models for m in model.modules()]
    memories = {memory(tensor) for tensor in tensors}
    yield memories
    assert {memory(tensor) for value in owned for tensor in reached(value)} == memories
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept, strict=True))
    assert attributes == [(m, {k: repr(v) for k, v in vars(m).items()}) for model in models for m in model.modules()]


def assert_apart(result: object, memories: set[int]) -> None:
    assert not {memory(tensor) for tensor in reached(result) if tensor.device.type != "meta"} & memories


def assert_shares_parameters_alone(program: Program, model: nn.Module, memories: set[int]) -> None:
    """A program reads the model's own parameters and buffers, by their names, and does not write to them."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name in program.parameter_names():
        tensor = program.tensor(name)
        assert memory(tensor) not in memories or memory(tensor) == memory(own[name]), name
    for tensor in program.example.tensors():
        assert memory(tensor) not in memories


FAST = ("mlp", "cnn", "llama-tied", "patched")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_trace_run_choose_and_deploy(name):
    model, example = make(name)
    with untouched(model, example) as memories:
        program = mxcompile.trace(model, example)
        assert_shares_parameters_alone(program, model, memories)
        lowered = mxcompile.recipes()[RECIPE].run(program, [example])
        assert_shares_parameters_alone(lowered, model, memories)
        mxcompile.choose(program)
        program(**example)
        lowered(**example)
        deployed = mxcompile.deploy(lowered, model)
        assert_apart(deployed, memories)
        deployed(**example)
        assert_apart(deployed, memories)


@pytest.mark.parametrize("name", ["mlp", "patched"])
def test_one_call_with_a_dump_and_compile_module(name, tmp_path):
    model, example = make(name)
    with untouched(model, example) as memories:
        options = {"recipe": "w4a8-mxint", "calibration": [example], "dump": tmp_path / "out"}
        quantized = mxcompile.quantize_and_compile(model, example, **options)
        assert_apart(quantized, memories)
        assert_apart(mxcompile.quantize_and_compile(model, example, recipe=RECIPE, compile=False), memories)


@pytest.mark.parametrize("name", ["llama-tied", "patched"])
def test_explain_and_bisect(name):
    model, example = make(name)
    with untouched(model, example) as memories:
        assert_apart(mxcompile.explain(model, example), memories)
        if name != "patched":
            assert_apart(mxcompile.bisect(model, example, recipe=RECIPE, kl=100.0), memories)


@pytest.mark.parametrize("name", ["llama-tied", "patched"])
def test_save_load_and_export(name, tmp_path):
    model, example = make(name)
    quantized = mxcompile.quantize_and_compile(model, example, recipe=RECIPE, compile=False)
    with untouched(model, quantized, example) as memories:
        mxcompile.save(quantized, tmp_path / "saved")
        loaded = mxcompile.load(tmp_path / "saved", model=make(name)[0])
        assert_apart(loaded, memories)
        if name == "patched":
            mxcompile.export(quantized, example, tmp_path / "model.pt2")


def test_evaluate():
    model, reference = build("llama").train(), build("llama")
    windows = inputs("llama")["input_ids"]
    with untouched(model, reference, windows):
        mxcompile.evaluate(model, windows, reference)
