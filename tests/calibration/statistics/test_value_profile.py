"""The profile of a value: each number by its definition, batches merged, and values that have no spread."""

import pytest
import torch

from mxcompile.calibration.statistics.value_profile import Profile, ValueProfile
from mxcompile.errors import NoDataError
from mxcompile.numerics.importance import token_weights


def profiled(*batches, weights=()):
    observer = ValueProfile()
    for index, batch in enumerate(batches):
        observer.update(batch, weights[index] if weights else 1.0)
    return Profile.of(observer.value)


def spread(*shape):
    """Values whose channels differ, one of them much larger."""
    channels = torch.exp(torch.randn(shape[-1]))
    channels[5] *= 30
    return torch.randn(*shape) * channels


def test_the_numbers_are_those_of_their_definitions():
    torch.manual_seed(0)
    x = spread(3, 40, 200)
    rows = x.reshape(-1, 200).double()
    rows = rows * token_weights(rows.float()).sqrt().double()
    energy = rows.square().mean(0)
    blocks = rows.square().split(32, -1)
    largest = torch.stack([block.amax(-1) for block in blocks], -1).mean()
    mean = torch.stack([block.mean(-1) for block in blocks], -1).mean()
    tokens = x.double().square().sum(-1)

    def kurtosis(values, dim):
        centered = values - values.mean(dim, keepdim=True)
        return centered.pow(4).mean(dim) / centered.square().mean(dim).square() - 3

    expected = Profile(
        channel_ratio=float(rows.abs().amax(0).max() / rows.abs().amax(0).median()),
        channel_kurtosis=float(kurtosis(rows, -1).mean()),
        token_kurtosis=float(kurtosis(rows, 0).median()),
        top_share=float(energy.topk(2).values.sum() / energy.sum()),
        in_block=float(largest / mean),
        first_token=float((tokens[:, 0] / tokens.median(-1).values).mean()),
    )
    assert vars(profiled(x)) == pytest.approx(vars(expected), rel=1e-5)


def test_known_values():
    """One channel in a block has all the energy: 32; all are equal: 1; normal tokens have no excess kurtosis."""
    one = torch.zeros(2, 8, 64)
    one[..., ::32] = 1.0
    assert profiled(one).in_block == 32
    assert profiled(torch.ones(2, 8, 64)) == Profile(1.0, 0.0, 0.0, pytest.approx(1 / 64), 1.0, 1.0)
    torch.manual_seed(0)
    normal = profiled(torch.randn(4, 2000, 64))
    assert abs(normal.token_kurtosis) < 0.1


def test_the_first_token_of_a_sequence():
    x = torch.ones(2, 9, 32)
    x[:, 0] *= 10
    assert profiled(x).first_token == pytest.approx(100)
    assert profiled(x.reshape(-1, 32)).first_token == 0


def test_merged_and_weighted_batches():
    torch.manual_seed(0)
    first, second = spread(2, 16, 96), spread(4, 16, 96)
    whole = profiled(first, second)
    merged, other = ValueProfile(), ValueProfile()
    merged.update(first)
    other.update(second)
    merged.merge(other)
    assert vars(Profile.of(merged.value)) == pytest.approx(vars(whole))
    twice = profiled(first, second, second)
    assert vars(profiled(first, second, weights=(1.0, 2.0))) == pytest.approx(vars(twice))
    merged.merge(ValueProfile())
    assert Profile.of(merged.value) == whole


@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (2, 1, 5), (3, 0, 8)])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_odd_shapes_zeros_and_extreme_values_are_finite(shape, scale):
    observer = ValueProfile()
    observer.update(torch.ones(shape) * scale)
    if 0 in shape:
        with pytest.raises(NoDataError):
            _ = observer.value
    else:
        assert torch.isfinite(observer.value).all()
