"""Recordings of kernel calls: what follows a tensor that moves between replays, and what cannot be recorded."""

import pytest
import torch
from cpu_kernels import needs_compiler, packed

from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.kernels.cpu import linears
from mxcompile.kernels.cpu.recording import LinearsCall, Recording, Slot

pytestmark = needs_compiler


def test_a_slot_ends_with_its_last_element():
    tensor = torch.zeros(4, 8)[1:3, ::2]
    assert Slot.of(tensor) == Slot(tensor.data_ptr(), tensor.data_ptr() + (8 + 6 + 1) * 4)
    assert Slot.of(torch.zeros(0, 4)).begin == Slot.of(torch.zeros(0, 4)).end


def test_slots_move_by_themselves_unless_they_were_one():
    recording = Recording([], [Slot(100, 108), Slot(40, 80), Slot(100, 108)])
    assert recording.moved([100, 40, 100]) == []
    assert recording.moved([100, 48, 100]) == [1]
    assert recording.moved([108, 40, 108]) == [0, 2]
    assert recording.moved([108, 40, 100]) is None


def test_slots_that_overlap_in_part_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        Recording([], [Slot(40, 80), Slot(72, 100)])


@pytest.fixture(params=[1, 4])
def threads(request):
    """More of them than cores, maybe."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("rounding", [None, (MXINT8, ScaleRule.FLOOR)])
def test_replayed_matmuls_have_the_bits_of_others(dtype, tokens, rounding, threads):
    """Several weights of different heights, more rows than one task has, x and one output elsewhere than recorded."""
    weights = [(*packed(MXINT4, rows, 96, rows)[:2], None) for rows in (6000, 7, 64)]
    weights[1] = (*weights[1][:2], torch.randn(7).to(dtype))
    outputs = [torch.empty(tokens, len(weight[0]), dtype=dtype) for weight in weights]
    x = torch.zeros(tokens, 96, dtype=dtype)
    call = LinearsCall(x, tuple(weights), tuple(outputs), MXINT4, rounding)
    recording = Recording([call], [Slot.of(x), Slot.of(outputs[0])])
    for _ in range(5):
        other, y = torch.randn(tokens, 96).to(dtype), torch.empty_like(outputs[0])
        addresses = [other.data_ptr(), y.data_ptr()]
        assert recording.replay(addresses, recording.moved(addresses))
        at_once = linears.linears(other, weights, MXINT4, rounding)
        torch.set_num_threads(1)
        expected = linears.linears(other, weights, MXINT4, rounding)
        torch.set_num_threads(threads)
        for actual, same, value in zip([y, *outputs[1:]], at_once, expected, strict=True):
            assert torch.equal(actual, value)
            assert torch.equal(same, value)
