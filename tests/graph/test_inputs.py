"""Inputs: every accepted form of example inputs and calibration data is normalized alike; any other form is refused
with a message that lists the accepted ones.
"""

from collections import UserDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxcompile.errors import InputError
from mxcompile.graph.inputs import Inputs, as_batches, as_inputs, check_batches, map_leaves, named_leaves

X, Y = torch.arange(6.0).reshape(2, 3), torch.arange(4).reshape(2, 2)
examples = settings(derandomize=True, deadline=None, database=None, max_examples=100)


def same(one: Inputs, other: Inputs) -> bool:
    return one.args == other.args and one.kwargs == other.kwargs  # the very same tensors


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (X, Inputs((X,))),
        ((X, Y), Inputs((X, Y))),
        ([X, Y], Inputs((X, Y))),
        ((X, {"a": Y}), Inputs((X, {"a": Y}))),
        ({"a": X, "b": Y}, Inputs((), {"a": X, "b": Y})),
        (UserDict({"a": X}), Inputs((), {"a": X})),
        (Inputs((X,), {"b": Y}), Inputs((X,), {"b": Y})),
    ],
    ids=["tensor", "tuple", "list", "nested", "dict", "mapping", "Inputs"],
)
def test_as_inputs(example, expected):
    assert same(as_inputs(example), expected)


@pytest.mark.parametrize("example", [None, 3, "text", {1, 2}, iter([X])], ids=lambda e: type(e).__name__)
def test_other_examples_are_refused(example):
    with pytest.raises(InputError) as caught:
        as_inputs(example)
    assert str(caught.value) == (
        f"example inputs are a {type(example).__name__}; pass a dict of keyword arguments, a tuple of positional "
        "arguments, or a single tensor"
    )


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        (X, [Inputs((X,))]),
        ((X, Y), [Inputs((X, Y))]),
        ({"a": X}, [Inputs((), {"a": X})]),
        (UserDict({"a": X}), [Inputs((), {"a": X})]),
        (Inputs((X,)), [Inputs((X,))]),
        ([X, Y], [Inputs((X,)), Inputs((Y,))]),
        ([(X, Y), (Y, X)], [Inputs((X, Y)), Inputs((Y, X))]),
        ([[X, Y]], [Inputs((X, Y))]),
        ([{"a": X}, {"a": Y}], [Inputs((), {"a": X}), Inputs((), {"a": Y})]),
        ((b for b in (X, Y)), [Inputs((X,)), Inputs((Y,))]),
    ],
    ids=["tensor", "tuple", "dict", "mapping", "Inputs", "tensors", "tuples", "lists", "dicts", "generator"],
)
def test_as_batches(calibration, expected):
    batches = list(as_batches(calibration))
    assert len(batches) == len(expected)
    assert all(map(same, batches, expected))


def test_a_data_loader():
    loader = torch.utils.data.DataLoader([{"a": row} for row in X], batch_size=2)
    (batch,) = as_batches(loader)
    assert torch.equal(batch.kwargs["a"], X)


@pytest.mark.parametrize("empty", [[], iter(()), {}.values()], ids=["list", "iterator", "view"])
def test_no_batches(empty):
    with pytest.raises(
        InputError, match=r"calibration data is empty \(an exhausted iterator\?\); pass a list of batch"
    ):
        list(as_batches(empty))


def test_calibration_of_no_accepted_form():
    with pytest.raises(InputError, match="calibration is a int; pass a batch or an iterable of batches"):
        list(as_batches(3))
    with pytest.raises(InputError, match=r"calibration\[0\] is a str"):
        list(as_batches(["a sentence"]))


def test_tensors_in_order():
    inputs = Inputs((X, [Y, 3]), {"a": {"b": X}, "c": None})
    assert [id(t) for t in inputs.tensors()] == [id(X), id(Y), id(X)]


def test_repeated_doubles_a_batch_of_one():
    one = Inputs((X[:1], [Y[:1]]), {"flag": True, "none": None})
    two = one.with_doubled_batch()
    assert torch.equal(two.args[0], X[[0, 0]])
    assert torch.equal(two.args[1][0], Y[[0, 0]])
    assert two.kwargs == {"flag": True, "none": None}
    assert one.args[0].shape[0] == 1


@pytest.mark.parametrize(
    "inputs",
    [Inputs((X,)), Inputs((X[:1], Y)), Inputs((X[:1], torch.tensor(3))), Inputs((), {"flag": True}), Inputs()],
    ids=["batch of two", "mixed", "scalar", "no tensor", "nothing"],
)
def test_repeated_leaves_other_batches_alone(inputs):
    assert inputs.with_doubled_batch() is None


leaves = st.integers() | st.none() | st.text(max_size=3)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@examples
@given(trees)
def test_map_leaves_keeps_the_structure(tree):
    assert map_leaves(lambda leaf: leaf, tree) == tree
    wrapped = map_leaves(lambda leaf: frozenset({leaf}), tree)
    assert [path for path, _ in named_leaves(wrapped)] == [path for path, _ in named_leaves(tree)]
    assert [leaf for _, leaf in named_leaves(wrapped)] == [frozenset({leaf}) for _, leaf in named_leaves(tree)]


def test_paths_of_leaves():
    tree = {"logits": 1, "cache": [(2, 3), {"keys": 4}]}
    assert list(named_leaves(tree)) == [("logits", 1), ("cache.0.0", 2), ("cache.0.1", 3), ("cache.1.keys", 4)]
    assert list(named_leaves(5)) == [("", 5)]
    assert list(named_leaves(())) == []


def test_a_model_output_is_a_mapping():
    from transformers.modeling_outputs import CausalLMOutput

    (found,) = named_leaves(CausalLMOutput(logits=X))
    assert found[0] == "logits"
    assert isinstance(found[1], Tensor)


# Calls that differ from the traced one


TRACED = Inputs((X,), {"ids": Y, "scale": 2.0, "mask": None, "pair": [X, X]})


def call(**changes: object) -> Inputs:
    return Inputs((X,), TRACED.kwargs | changes)


def test_sizes_and_integer_dtypes_may_differ():
    TRACED.check_call(Inputs((X[:1],), {**TRACED.kwargs, "ids": Y.int().repeat(2, 3), "pair": (X, X)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [[1, 2], [3, 4]]}, r'input ids is a list, .* with a tensor: a tokenizer .* return_tensors="pt"'),
        ({"ids": []}, "input ids is a list"),
        ({"ids": "text"}, "input ids is a str, and the model was traced with a tensor: pass the tokenizer's output"),
        ({"ids": Y.numpy()}, r"input ids is a ndarray, .*: convert it with torch\.from_numpy"),
        ({"ids": None}, "input ids is a NoneType"),
        ({"ids": Y[0]}, "input ids has 1 dimensions, it was traced with 2"),
        ({"ids": Y.float()}, r"input ids is torch\.float32, it was traced with torch\.int64"),
        ({"pair": [X, X.half()]}, r"input pair\.1 is torch\.float16, it was traced with torch\.float32"),
        ({"pair": [X]}, "input pair has 1 items, it was traced with 2"),
        ({"ids": Y.to("meta")}, "input ids is on meta, it was traced with cpu.* or move them there"),
        ({"mask": X}, "input mask is a tensor, it was traced with None"),
        ({"scale": X}, r"input scale is a tensor, it was traced with 2\.0"),
    ],
)
def test_a_value_of_another_kind_is_named(change, message):
    with pytest.raises(InputError, match=message):
        TRACED.check_call(call(**change))


def test_other_arguments():
    with pytest.raises(
        InputError, match=r"1 positional arguments and keywords \['ids'\]; the model was traced with 1 and"
    ):
        TRACED.check_call(Inputs((X,), {"ids": Y}))
    with pytest.raises(InputError, match="input 0 has 1 dimensions"):
        TRACED.check_call(Inputs((X[0],), TRACED.kwargs))


def test_the_batch_is_named():
    with pytest.raises(InputError, match=r"^calibration\[1\]: input ids is a list"):
        check_batches(TRACED, [TRACED, call(ids=[1])])
    with pytest.raises(InputError, match=r"^calibration\[1\] is a str; pass a dict"):
        list(as_batches([X, "text"]))
    for refused in ("text", Y.numpy()):
        with pytest.raises(InputError, match=f"^calibration is a {type(refused).__name__}; pass a batch"):
            list(as_batches(refused))


def test_copies_are_contiguous():
    copied = Inputs((X.t(),), {"a": X.expand(4, 2, 3)}).cloned()
    assert all(tensor.is_contiguous() for tensor in copied.tensors())
    assert torch.equal(copied.args[0], X.t())
