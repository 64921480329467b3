"""copy_module: what a module's forward reads is copied wherever it is held; what cannot be copied is named."""

import functools
import threading
import types
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.errors import InputError
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.reachable import holders, reachable

X = torch.randn(4, 8)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def closure(model: nn.Sequential) -> None:
    plain = model[1].forward
    model[1].forward = lambda x: plain(x) * 2


def mutual(model: nn.Sequential) -> None:
    """Two functions that share a variable, which one of them assigns."""
    count, weight = torch.zeros(1), model[0].weight

    def add(x: Tensor) -> Tensor:
        nonlocal count
        count = count + 1
        return read(x)

    def read(x: Tensor) -> Tensor:
        return x @ weight + count

    model[1].forward = add


def script(model: nn.Sequential) -> None:
    """As in a notebook, where the original forward is a global."""
    scope = {"plain": model[1].forward, "factor": 3.0}
    exec("def scaled(x):\n    return plain(x) * factor\ndef patched(x):\n    return scaled(x)", scope)
    model[1].forward = scope["patched"]


def partial(model: nn.Sequential) -> None:
    model[1].forward = functools.partial(F.linear, weight=model[0].weight)


def method(model: nn.Sequential) -> None:
    model[1].forward = types.MethodType(lambda self, x: F.linear(x, self.weight), model[1])


def method_of_another(model: nn.Sequential) -> None:
    model[1].forward = model[0].forward


def default(model: nn.Sequential) -> None:
    model[1].forward = lambda x, *, weight=model[0].weight: F.linear(x, weight)


def method_of_a_tensor(model: nn.Sequential) -> None:
    model[1].forward = model[0].bias.mul


def hooks(model: nn.Sequential) -> None:
    first = model[0]
    first.register_forward_pre_hook(lambda module, args: (args[0] + first.bias,))
    model[1].register_forward_hook(lambda module, args, result: result + first(result))


def function_in_a_list(model: nn.Sequential) -> None:
    functions = [lambda x: x @ model[0].weight]
    model[1].functions = functions
    model[1].forward = types.MethodType(lambda self, x: self.functions[0](x), model[1])


def modules_in_a_list(model: nn.Sequential) -> None:
    model[1].parts = [nn.Linear(8, 8)]
    model[1].forward = types.MethodType(lambda self, x: self.parts[0](x), model[1])


def tensors_in_containers(model: nn.Sequential) -> None:
    model[1].plain, model[1].table = torch.ones(8), {"a": [torch.ones(8)]}
    model[1].forward = types.MethodType(lambda self, x: x * self.plain + self.table["a"][0], model[1])


def parametrized(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[1])


def weight_computed_by_a_hook(model: nn.Sequential) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[1])


CASES = [
    *(closure, mutual, script, partial, method, method_of_another, default, method_of_a_tensor, hooks),
    *(function_in_a_list, modules_in_a_list, tensors_in_containers, parametrized, weight_computed_by_a_hook),
]


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_a_copy_computes_the_same_and_reads_nothing_of_the_original(change):
    model = layers()
    change(model)
    copied, kept = copy_module(model), copy_module(model)  # one may count its calls
    expected = model(X)
    assert torch.equal(copied(X), expected)
    with torch.no_grad():
        for _, value in reachable(model):
            if isinstance(value, Tensor) and value.is_leaf:
                value.zero_()
    assert torch.equal(kept(X), expected)
    assert not torch.equal(model(X), expected)


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_tensors_are_shared_on_request(change):
    model = layers()
    change(model)
    copied = copy_module(model, (*model.parameters(), *model.buffers()))
    assert all(one is other for one, other in zip(copied.parameters(), model.parameters(), strict=True))
    assert torch.equal(copied(X), model(X))


def test_a_tensor_is_replaced_wherever_the_module_holds_it():
    model = layers()
    default(model)
    model[1].weights = [model[0].weight]
    weight = nn.Parameter(torch.randn(8, 8))
    copied = copy_module(model, replaced={id(model[0].weight): weight})
    assert copied[0].weight is weight
    assert copied[1].weights[0] is weight
    assert torch.equal(copied(X), F.linear(F.linear(X, weight, model[0].bias), weight))


def test_a_function_without_tensors_is_shared():
    model = layers()
    model[1].activation = F.relu
    assert copy_module(model)[1].activation is F.relu


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.guard = threading.Lock()


class Shared(nn.Linear):
    def __deepcopy__(self, memo: object) -> "Shared":
        return self


@pytest.mark.parametrize(
    ("attribute", "kind", "make"),
    [
        ("guard", "lock", threading.Lock),
        ("source", "generator", lambda: (i for i in range(3))),
    ],
)
def test_an_attribute_that_cannot_be_copied(attribute, kind, make):
    model = nn.Sequential(nn.Linear(8, 8), layers())
    setattr(model[1][0], attribute, make())
    with pytest.raises(InputError) as caught:
        copy_module(model)
    assert str(caught.value).startswith(
        f"this Sequential cannot be copied, and mxcompile works on copies: its attribute '1.0.{attribute}' "
        f"(a {kind} of Linear) fails with TypeError: cannot pickle "
    )
    assert "Delete the attribute" in str(caught.value)


def test_what_would_go_on_reading_the_original():
    model = layers()
    model[1].parent = weakref.ref(model)
    with pytest.raises(InputError, match=r"its '1\.parent -> referent' would go on reading a Sequential of the orig"):
        copy_module(model)
    model = layers()
    plain = model[1].forward
    model[1].forward = functools.lru_cache(lambda x: plain(x) * 2)
    with pytest.raises(InputError, match=r"its '1\.forward.* -> plain -> self' would go on reading a Linear"):
        copy_module(model)
    with pytest.raises(InputError, match=r"its '0' would go on reading a Shared of the original"):
        copy_module(nn.Sequential(Shared(8, 8)))
    with pytest.raises(InputError, match=r"attribute '0\.guard'"):
        copy_module(nn.Sequential(Locked()))


def test_holders_are_all_places():
    model = layers()
    default(model)
    model[1].weights = [model[0].weight]
    assert set(holders(model, model[0].weight)) == {"0.weight", "1.forward -> defaults[1]['weight']", "1.weights[0]"}
