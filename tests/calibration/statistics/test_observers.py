"""Observers: an observer fed batch by batch, or merged from several, has the statistic of all batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxcompile.calibration.statistics import observers
from mxcompile.calibration.statistics.observers import (
    BlockMoments,
    ChannelAbsMax,
    ChannelImportance,
    ChannelMeanAbs,
    Observer,
    RotatedObserver,
    TokenSample,
)
from mxcompile.errors import NoDataError
from mxcompile.numerics.hadamard import rotate_input

examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)
KINDS = {
    "BlockMoments": lambda: BlockMoments(4),
    "ChannelAbsMax": ChannelAbsMax,
    "ChannelMeanAbs": ChannelMeanAbs,
    "ChannelImportance": ChannelImportance,
    "RotatedObserver": lambda: RotatedObserver(ChannelImportance(), 4),
    "TokenSample": TokenSample,
}


def fed(observer: Observer, batches: list[Tensor]) -> Observer:
    for batch in batches:
        observer.update(batch)
    return observer


def rows(values: Tensor) -> list[list[float]]:
    """The rows of a statistic in a fixed order: a sample has none."""
    return sorted(values.reshape(-1, values.shape[-1]).tolist())


# Merging


def test_every_observer_is_tested():
    kinds = [kind for kind in vars(observers).values() if isinstance(kind, type) and hasattr(kind, "merge")]
    public = {kind.__name__ for kind in kinds if not kind.__name__.startswith("_")}
    assert public - {"Observer"} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", range(4))
def test_merging_observers_of_some_batches_each_gives_the_statistic_of_all(kind, split):
    """As if calibration was split over two devices; an observer that has seen nothing counts for nothing."""
    batches = [torch.randn(*shape, 8) * 10.0**power for power, shape in enumerate([(2, 3), (5,), (4, 1)])]
    whole = fed(KINDS[kind](), batches)
    merged, other = fed(KINDS[kind](), batches[:split]), fed(KINDS[kind](), batches[split:])
    merged.merge(other)
    torch.testing.assert_close(rows(merged.value), rows(whole.value), rtol=1e-6, atol=0)
    if split < 3:
        assert torch.equal(other.value, fed(KINDS[kind](), batches[split:]).value)


def test_rotated_observers_with_other_blocks_are_not_merged():
    merged, other = (fed(RotatedObserver(ChannelAbsMax(), block), [torch.ones(2, 8) * block]) for block in (2, 4))
    merged.merge(other)
    assert torch.equal(merged.value, rotate_input(torch.ones(8) * 2, 2).abs())


def test_a_merged_sample_keeps_the_largest_tokens_of_both_and_draws_from_both():
    """Of 600 tokens of channel 0 and 600 of channel 1: the 20 largest of each; the others about half and half."""
    samples = []
    for channel in (0, 1):
        tokens = torch.zeros(600, 2)
        tokens[:, channel] = 1.0
        tokens[:20, channel] = 100.0 + torch.arange(20)
        samples.append(fed(TokenSample(), [tokens]))
    merged, other = samples
    merged.merge(other)
    assert merged.value.shape == (TokenSample.SIZE, 2)
    largest = merged.value[: TokenSample.LARGEST]
    assert set(largest.sum(1).tolist()) == {float(size) for size in range(104, 120)}
    assert [int((largest[:, channel] > 0).sum()) for channel in (0, 1)] == [16, 16]
    drawn = (merged.value[TokenSample.LARGEST :, 0] > 0).float().mean().item()
    assert 0.4 < drawn < 0.6


# ChannelAbsMax

pieces = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2), min_size=1, max_size=5)


def tensors(shapes: list[list[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    filled = torch.randn(1, 3, generator=generator)  # so that something is seen
    return [filled.to(dtype), *(torch.randn(*shape, 3, generator=generator).to(dtype) for shape in shapes)]


@examples
@given(pieces, st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_merged_observers_equal_one_pass(shapes, cut, dtype):
    batches = tensors(shapes, dtype)
    one, left, right = ChannelAbsMax(), ChannelAbsMax(), ChannelAbsMax()
    for batch in batches:
        one.update(batch)
    for batch in batches[: cut + 1]:
        left.update(batch)
    for batch in [batches[0], *batches[cut + 1 :]]:
        right.update(batch)
    left.merge(right)
    expected = torch.cat([batch.reshape(-1, 3) for batch in batches]).abs().amax(0)
    assert one.value.dtype == torch.float32
    assert torch.equal(one.value, expected.float())
    assert torch.equal(left.value, one.value)


def test_merge_leaves_the_other_alone():
    one, other = ChannelAbsMax(), ChannelAbsMax()
    one.update(torch.tensor([[3.0, 1.0]]))
    other.update(torch.tensor([[-2.0, 2.0]]))
    one.merge(other)
    assert one.value.tolist() == [3.0, 2.0]
    assert other.value.tolist() == [2.0, 2.0]


def test_not_a_number_is_not_hidden():
    observer = ChannelAbsMax()
    observer.update(torch.tensor([[1.0, torch.nan, torch.inf]]))
    observer.update(torch.tensor([[2.0, 5.0, 5.0]]))
    assert observer.value[0] == 2.0
    assert observer.value[1].isnan()
    assert observer.value[2] == torch.inf


def test_no_data():
    observer = ChannelAbsMax()
    observer.update(torch.empty(0, 3))
    with pytest.raises(NoDataError, match="the observer has seen no data"):
        _ = observer.value


def test_merge_with_an_observer_that_has_seen_nothing():
    observer = ChannelAbsMax()
    observer.update(torch.ones(2, 3))
    observer.merge(ChannelAbsMax())
    assert torch.equal(observer.value, torch.ones(3))


def test_a_single_vector():
    observer = ChannelAbsMax()
    observer.update(torch.tensor([1.0, -2.0]))
    assert observer.value.tolist() == [1.0, 2.0]


# ChannelImportance


def observed(*batches):
    observer = ChannelImportance()
    for batch in batches:
        observer.update(batch)
    return observer


def test_importance_is_the_mean_square_with_great_tokens_capped():
    """Nine tokens of 1 and one of 100: in its batch it counts as 4 x 1, in a batch of its own as it is."""
    ones, great = torch.ones(9, 4), torch.full((1, 4), 100.0)
    together, apart = observed(torch.cat((ones, great))), observed(ones, great)
    torch.testing.assert_close(together.value, torch.full((4,), (9 + 4.0) / 10), rtol=1e-6, atol=0)
    torch.testing.assert_close(apart.value, torch.full((4,), (9 + 100.0**2) / 10), rtol=1e-6, atol=0)


def test_a_channel_that_was_never_seen_still_counts():
    x = torch.ones(4, 3)
    x[:, 1] = 0.0
    assert observed(x).value[1] == pytest.approx(2 / 3 * 1e-6, rel=1e-5)
    with pytest.raises(NoDataError, match="the observer has seen no data"):
        _ = observed(torch.empty(0, 3)).value
