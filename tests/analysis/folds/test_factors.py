"""Factors, a union-find over ids, compared with a naive partition; merging and reshaping of label tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxcompile.analysis.folds.factors import (
    ONE,
    UNKNOWN,
    Factors,
    InconsistentSizesError,
    collapsed,
    compact,
    from_shape,
    merged,
    to_shape,
)

examples = settings(derandomize=True, deadline=None, database=None, max_examples=200)
COUNT = 12
# 0 is ONE; the others are fresh ids
pairs = st.lists(st.tuples(st.integers(UNKNOWN, COUNT), st.integers(UNKNOWN, COUNT)), max_size=20)


def fresh(count: int) -> tuple[Factors, Tensor]:
    factors = Factors()
    return factors, factors.new(count)


def same(factors: Factors, one: int, other: int) -> bool:
    return int(factors.find(torch.tensor(one))) == int(factors.find(torch.tensor(other)))


def naive_partition(united: list[tuple[int, int]]) -> list[set[int]]:
    parts = [{name} for name in range(COUNT + 1)]
    for one, other in united:
        if UNKNOWN in (one, other):
            continue
        touched = [part for part in parts if one in part or other in part]
        parts = [part for part in parts if part not in touched] + [set().union(*touched)]
    return parts


# Ids


def test_new_ids_are_different_and_none_is_one():
    factors, first = fresh(3)
    second = factors.new(2)
    assert torch.cat((first, second)).tolist() == [1, 2, 3, 4, 5]
    assert factors.find(second).tolist() == [4, 5]


def test_unite_keeps_the_smallest_id():
    factors, ids = fresh(4)
    factors.unite(ids[[3, 1]], ids[[1, 2]])
    assert factors.find(ids).tolist() == [1, 2, 2, 2]


def test_a_chain_becomes_one_factor():
    factors, ids = fresh(1000)
    factors.unite(ids[1:], ids[:-1])
    assert set(factors.find(ids).tolist()) == {1}


def test_a_chain_from_the_far_end():
    factors, ids = fresh(50)
    for place in reversed(range(49)):
        factors.unite(ids[place], ids[place + 1])
    assert set(factors.find(ids).tolist()) == {1}


def test_unknown_unites_with_nothing():
    factors, ids = fresh(2)
    factors.unite(ids, torch.tensor([UNKNOWN, UNKNOWN]))
    factors.unite(torch.tensor(UNKNOWN), torch.tensor(ONE))
    assert factors.find(torch.tensor([UNKNOWN, ONE, 1, 2])).tolist() == [UNKNOWN, ONE, 1, 2]


def test_shapes_broadcast():
    factors, ids = fresh(6)
    factors.unite(ids.view(2, 3), ids[:3])
    assert factors.find(ids).tolist() == [1, 2, 3, 1, 2, 3]


def test_shapes_that_do_not_fit():
    factors, ids = fresh(5)
    with pytest.raises(InconsistentSizesError):
        factors.unite(ids[:2], ids[2:])


def test_a_copy_is_independent():
    factors, ids = fresh(3)
    other = factors.copy()
    other.pin(ids[:1], "here")
    other.new(2)
    assert factors.find(ids).tolist() == [1, 2, 3]
    assert factors.reasons == {}


# Pins


def test_pin_says_why_once():
    factors, ids = fresh(3)
    factors.unite(ids[:1], ids[1:2])
    factors.pin(ids[1:2], "first")
    factors.pin(ids, "second")
    assert factors.find(ids).tolist() == [ONE] * 3
    assert factors.reasons == {1: "first", 3: "second"}


def test_what_is_united_with_a_pinned_factor_is_pinned():
    factors, ids = fresh(3)
    factors.pin(ids[2:], "here")
    factors.unite(ids[:1], ids[2:])
    assert factors.find(ids).tolist() == [ONE, 2, ONE]


def test_pinning_nothing_gives_no_reason():
    factors, _ = fresh(1)
    factors.pin(torch.tensor([UNKNOWN, ONE]), "here")
    assert factors.reasons == {}


@examples
@given(pairs)
def test_unite_agrees_with_a_naive_partition(united):
    factors, _ = fresh(COUNT)
    for one, other in united:
        factors.unite(torch.tensor(one), torch.tensor(other))
    _check_partition(factors, united)


@examples
@given(pairs)
def test_unite_at_once_agrees_with_one_by_one(united):
    factors, _ = fresh(COUNT)
    both = torch.tensor(united, dtype=torch.long).view(-1, 2)
    factors.unite(both[:, 0], both[:, 1])
    _check_partition(factors, united)


def _check_partition(factors: Factors, united: list[tuple[int, int]]) -> None:
    found = factors.find(torch.arange(COUNT + 1))
    for part in naive_partition(united):
        assert set(found[sorted(part)].tolist()) == {min(part)}


# Labels


def test_merged_fills_unknown_places_and_unites_known_ones():
    factors, _ = fresh(4)
    one = torch.tensor([1, UNKNOWN, 2, UNKNOWN])
    other = torch.tensor([UNKNOWN, 3, 4, UNKNOWN])
    assert merged(factors, one, other).tolist() == [1, 3, 2, UNKNOWN]
    assert same(factors, 2, 4)
    assert not same(factors, 1, 3)


def test_merged_broadcasts_and_is_compact():
    factors, ids = fresh(3)
    assert merged(factors, ids.view(1, 3), torch.full((4, 1), UNKNOWN)).tolist() == [[1, 2, 3]]


labels = st.lists(st.integers(UNKNOWN, COUNT), min_size=6, max_size=6)


@examples
@given(labels, labels, pairs)
def test_merged_does_not_depend_on_the_order(one, other, united):
    results = []
    for first, second in ((one, other), (other, one)):
        factors, _ = fresh(COUNT)
        for pair in united:
            factors.unite(torch.tensor(pair[0]), torch.tensor(pair[1]))
        joint = merged(factors, torch.tensor(first), torch.tensor(second)).expand(6)
        results.append((joint.tolist(), factors.find(torch.arange(COUNT + 1)).tolist()))
    assert results[0] == results[1]


def test_collapsed_unites_along_the_dimension():
    factors, ids = fresh(6)
    assert collapsed(factors, ids.view(2, 3), 0).tolist() == [[1, 2, 3]]
    assert factors.find(ids).tolist() == [1, 2, 3, 1, 2, 3]


def test_collapsed_ignores_unknown():
    factors, _ = fresh(2)
    assert collapsed(factors, torch.tensor([[UNKNOWN, 1], [2, UNKNOWN]]), 0).tolist() == [[2, 1]]
    assert not same(factors, 1, 2)


def test_collapsed_with_a_pinned_element_is_pinned():
    factors, ids = fresh(3)
    factors.pin(ids[1:2], "here")
    assert collapsed(factors, ids, 0).tolist() == [ONE]
    assert factors.find(ids).tolist() == [ONE] * 3


def test_collapsed_of_size_one_is_itself():
    factors, ids = fresh(3)
    assert collapsed(factors, ids.view(1, 3), 0).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([[1, 2], [1, 2]], [[1, 2]]),
        ([[1, 1], [2, 2]], [[1], [2]]),
        ([[1, 1], [1, 1]], [[1]]),
        ([[1, 2], [2, 1]], [[1, 2], [2, 1]]),
        ([[UNKNOWN, 1], [UNKNOWN, UNKNOWN]], [[UNKNOWN, 1], [UNKNOWN, UNKNOWN]]),
    ],
)
def test_compact(given, wanted):
    assert compact(torch.tensor(given)).tolist() == wanted


def test_compact_of_nothing():
    assert compact(torch.zeros(0, 3, dtype=torch.long)).shape[0] == 0


def test_to_shape_of_a_smaller_operand():
    factors, ids = fresh(6)
    assert to_shape(factors, ids.view(1, 2, 3), (3,)).tolist() == [1, 2, 3]
    assert same(factors, 1, 4)


def test_to_shape_of_an_operand_with_ones():
    factors, ids = fresh(6)
    assert to_shape(factors, ids.view(2, 3), (2, 1)).tolist() == [[1], [4]]
    assert factors.find(ids).tolist() == [1, 1, 1, 4, 4, 4]


def test_to_shape_of_a_scalar():
    factors, ids = fresh(3)
    assert to_shape(factors, ids, ()).tolist() == 1
    assert factors.find(ids).tolist() == [1, 1, 1]


def test_from_shape_aligns_to_the_right():
    _, ids = fresh(3)
    assert from_shape(ids, 3).shape == (1, 1, 3)
