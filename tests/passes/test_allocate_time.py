"""allocate: formats under a budget of time, from measured times of kernels."""

import pytest
from models import build, inputs, llama

import mxcompile
from mxcompile.analysis.format_items import find_items
from mxcompile.errors import InputError, PassError
from mxcompile.formats import MXINT4, MXINT8
from mxcompile.kernels.measured_times import times_of
from mxcompile.pipeline.pipeline import Pipeline

LISTED = "formats=[mxint4,mxint6,mxint8]"
BATCHES = [inputs("llama", 4, 32, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def program():
    return mxcompile.trace(llama(2), BATCHES[0])


def allocated(program, text, batches=BATCHES):
    return Pipeline.parse(f"allocate{{{text}}}").run(program, batches)


def decode_time(program, formats) -> float:
    """Microseconds of one token's matmuls, q/k/v and gate/up joined, by hand."""
    times, total = times_of("sm90"), 0.0
    for item in find_items(program, MXINT4, {}).free:
        outputs = sum(program.stored(name).shape[0] for name in item.weights)
        total += times.microseconds(formats[item.weights[0]], outputs, item.matmuls[0].in_features, 1)
    return total


def test_a_budget_of_time_holds_and_is_spent_where_it_matters(program):
    items = find_items(program, MXINT4, {}).free
    low, high = (
        decode_time(program, {name: fmt for item in items for name in item.weights}) for fmt in (MXINT8, MXINT4)
    )
    assert low < high  # so small a weight: only the launch counts, and it is shorter in 8 bits
    after = allocated(program, f"{LISTED},latency=decode,microseconds={(low + high) / 2},gpu=sm90,activation=mxint8")
    allocation = after.ledger[0].allocation
    assert decode_time(program, after.formats) == pytest.approx(allocation.microseconds)
    assert allocation.microseconds <= (low + high) / 2
    assert (allocation.unit, allocation.limit) == ("microsecond", f"{(low + high) / 2:g} us of matmuls (decode)")


def test_two_budgets_hold_together(program):
    text = f"{LISTED},bits=5,latency=prefill,microseconds=20,gpu=sm90,activation=mxint8"
    allocation = allocated(program, text).ledger[0].allocation
    assert allocation.bits <= 5
    assert allocation.microseconds <= 20
    assert allocation.limit == "5 bits a weight and 20 us of matmuls (prefill)"


def test_a_time_that_cannot_be_kept_says_what_the_fastest_formats_take(program):
    with pytest.raises(PassError, match=r"microseconds=1\}: the weights take more .* give microseconds=\d+ or more"):
        allocated(program, f"{LISTED},latency=decode,microseconds=1,gpu=sm90")
    with pytest.raises(InputError, match="no times were measured on cpu: name the GPU"):
        allocated(program, f"{LISTED},latency=decode,microseconds=1")


def test_experts_without_measured_times_count_none_and_say_so():
    program = mxcompile.trace(build("mixtral"), inputs("mixtral"))
    after = allocated(program, f"{LISTED},latency=decode,microseconds=20,gpu=sm90", [inputs("mixtral", 4, 16)])
    assert "no time of experts was measured: it counts none" in {miss.reason for miss in after.ledger[0].misses}
