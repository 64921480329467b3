import os
import signal
import time

import pytest
import rank_processes
import torch
from models import build
from rank_scenarios import batches

from mxcompile.analysis.choice import choose
from mxcompile.calibration.ranks.dealing import own_batches
from mxcompile.calibration.ranks.exchange import Ranks
from mxcompile.calibration.runs.run import BoundBatch, Runner, feed_observers
from mxcompile.calibration.statistics.observers import TokenSample
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.inputs import as_batches
from mxcompile.graph.trace import trace

COUNTS = (1, 2, 3, 4, 7)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
NOTICED = 300  # seconds on a busy machine, and far less than processes would wait for each other or work


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("costs", [[1.0] * 8, [1.0], [4.0, 1.0, 1.0, 1.0, 9.0], [0.0, 0.0], []])
def test_batches_are_dealt_out_in_order_and_once(count, costs):
    shares = [Ranks(number, count).share(costs) for number in range(count)]
    assert [index for share in shares for index in share] == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) <= sum(costs) / count + max(costs, default=0.0)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rows", [0, 1, 6, 100])
def test_rows_are_dealt_out_in_order_and_once(count, rows):
    parts = [list(range(rows))[Ranks(number, count).rows(rows)] for number in range(count)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_work_is_owned_by_the_process_with_the_least():
    assert Ranks(0, 2).owners([1.0, 5.0, 2.0, 2.0, 1.0]) == [1, 0, 1, 1, 0]
    assert Ranks(0, 1).owners([1.0, 2.0]) == [0, 0]


def test_samples_that_follow_each_other_are_the_sample_of_all_tokens():
    batches = torch.randn(6, 300, 4).unbind()
    whole, first, second = TokenSample(), TokenSample(), TokenSample()
    second.follow(4)
    for index, batch in enumerate(batches):
        whole.update(batch)
        (first if index < 4 else second).update(batch)
    merged = TokenSample()
    merged.merge(first)
    merged.merge(second)
    assert torch.equal(merged.value, whole.value)


def test_samples_of_masked_batches_are_those_of_one_process():
    """More tokens than a sample holds, many of them alike; the second of three processes begins with a hidden batch."""
    data = batches(20, 15, 25, 20, vocabulary=16)
    data[2]["attention_mask"][:, 9:] = 0
    program = trace(build("llama"), data[0])
    values = {matmul.activation for matmul in choose(program).matmuls}
    bound = [BoundBatch.of(program, bind_inputs(program, batch)) for batch in as_batches(data)]

    def sampled(count):
        merged = {value: TokenSample() for value in values}
        for number in range(count):
            program.ranks = Ranks(number, count)
            share, before = own_batches(program, as_batches(data))
            own = {value: [TokenSample()] for value in values}
            for (sample,) in own.values():
                sample.follow(before)
            for batch in bound[share.start : share.stop]:
                nodes = compute_nodes(program.graph.nodes)
                Runner(program).run_nodes(nodes, batch, feed_observers(own, batch.visibility))
            for value, (sample,) in own.items():
                merged[value].merge(sample)
        return merged

    expected = sampled(1)
    for count in (2, 3):
        samples = sampled(count)
        assert all(torch.equal(samples[value].value, expected[value].value) for value in values)


def test_a_process_alone_exchanges_nothing():
    ranks, values = Ranks(), torch.ones(3)
    ranks.sum(values)
    ranks.broadcast(values, 0)
    ranks.end()
    assert values.tolist() == [1.0] * 3
    assert ranks.gather(5) == [5]
    assert ranks.map(str, [1, 2]) == ["1", "2"]
    assert ranks.collect(values, 3) is values
    assert not ranks.any(False)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_kind_of_exchange(count):
    check_exchanges(rank_processes.run("exchanges", count))


@two_gpus
def test_every_kind_of_exchange_between_gpus():
    check_exchanges(rank_processes.run("exchanges_on_gpus", 2))


def check_exchanges(results):
    count = len(results)
    total = results[0][0].clone()
    for own, *_ in results[1:]:
        total += own
    for number, (own, summed, transposed, at_last, rows, sent, mapped, gathered, first, some) in enumerate(results):
        assert torch.equal(summed, total)
        assert torch.equal(transposed, total)
        assert torch.equal(at_last, total if number == count - 1 else own)
        assert torch.equal(rows, torch.arange(14).view(7, 2).to(torch.bfloat16))
        assert sent.tolist() == [1.0] * 3
        assert [square for square, _ in mapped] == [1, 4, 9, 16, 25]
        assert {owner for _, owner in mapped} == set(range(count))
        assert gathered == [{"number": other} for other in range(count)]
        assert (first, some) == (0, True)


@pytest.mark.slow
def test_all_processes_end_with_the_error_of_one():
    first, second = rank_processes.run("failures", 2)
    assert first["value"] == (
        "PassError",
        "pass 'failing' failed: ValueError: no such thing raised in process 1 of 2",
    )
    assert first["input"] == ("InputError", "pass 'failing': a bad batch raised in process 1 of 2")
    assert (first["signal"][0], second["signal"][0]) == ("KeyboardInterrupt", "KeyboardInterrupt")
    for what, named in (("data", "calibration data"), ("pipeline", "pipeline"), ("model", "model")):
        kind, text = first[f"other {what}"]
        assert kind == second[f"other {what}"][0] == "RankError"
        assert f"process 1 has another {named} than process 0: every process must make the same calls" in text
    assert "number 0" in first["instrument"][1]
    assert second["instrument"][1].endswith("number 0 raised in process 0 of 2")
    assert first["files"] == second["files"]
    assert first["files"][1].startswith("quantize_files runs in one process, and here several would write the same")
    assert first["files alone"][0] == "CheckpointError"
    assert second["alone"][0] == first["afterwards"][0] == second["afterwards"][0] == ""


@pytest.mark.slow
def test_a_process_that_dies_is_noticed(tmp_path):
    with rank_processes.started("lost", 2, tmp_path) as (survivor, dead):
        assert rank_processes.ended(dead, rank_processes.SECONDS) == 3
        assert rank_processes.ended(survivor, NOTICED) == 0, rank_processes.printed(tmp_path, 0)
    said = torch.load(tmp_path / "0.pt", weights_only=False)
    assert said == "RankError: process 0 has lost another process, which has ended: see what that one has printed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupt_of_one_process_ends_all(tmp_path, number):
    with rank_processes.started("working", 2, tmp_path) as processes:
        while not all((tmp_path / f"{other}.started").exists() for other in range(2)):
            assert all(process.is_alive() for process in processes), rank_processes.printed(tmp_path, 0)
            time.sleep(0.1)
        os.kill(processes[number].pid, signal.SIGINT)
        outputs = [
            (rank_processes.ended(each, NOTICED), rank_processes.printed(tmp_path, n))
            for n, each in enumerate(processes)
        ]
    ends = [torch.load(tmp_path / f"{other}.pt", weights_only=False) for other in range(2)]
    assert ends == ["KeyboardInterrupt"] * 2, outputs


@pytest.fixture(scope="module")
def alone():
    return rank_processes.run("learned", 1)[0]


@pytest.mark.slow
def test_two_processes_give_the_program_of_one_within_the_order_of_sums(alone):
    """At least 99 % of the stored numbers are equal; trained vectors are compared in the test below."""
    check_programs(alone, rank_processes.run("learned", 2), rank_processes.run("learned", 2)[0])


@two_gpus
def test_two_gpus_give_the_program_of_one_within_the_order_of_sums():
    runs = [rank_processes.run("learned_on_gpus", count) for count in (1, 2, 2)]
    check_programs(runs[0][0], runs[1], runs[2][0])


def check_programs(alone, processes, again):
    first, second = processes
    for name, expected in alone.items():
        tensors = first[name]["tensors"]
        assert all(torch.equal(tensors[key], second[name]["tensors"][key]) for key in tensors)
        assert all(torch.equal(tensors[key], again[name]["tensors"][key]) for key in tensors)
        assert first[name]["ledger"] == second[name]["ledger"]
        assert [line[:3] for line in first[name]["ledger"]] == [line[:3] for line in expected["ledger"]]
        equal = sum(int((tensors[key] == value).sum()) for key, value in expected["tensors"].items())
        assert equal >= 0.99 * sum(value.numel() for value in expected["tensors"].values())


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_whole_batches():
    (expected,) = rank_processes.run("trained", 1)
    for process in rank_processes.run("trained", 3):  # batches of 2, 3, 1 and 4 rows
        assert process["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        for name, vector in expected["vectors"].items():
            torch.testing.assert_close(process["vectors"][name], vector, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rounding_is_trained_alike_in_all_processes():
    """With all batches in each step as by one process, up to the order of sums; with one, in another order."""
    (expected,) = rank_processes.run("rounded_together", 1)
    first, *others = rank_processes.run("rounded_together", 3)
    for name in expected:
        tensors = first[name]["tensors"]
        assert all(torch.equal(tensors[key], other[name]["tensors"][key]) for key in tensors for other in others)
        assert all(first[name]["ledger"] == other[name]["ledger"] for other in others)
    assert sum("did not lower" in miss.reason for miss in first["all"]["ledger"][0][2]) < first["all"]["ledger"][0][1]
    alone, together = (process["all"]["tensors"] for process in (expected, first))
    equal = sum(int((together[key] == value).sum()) for key, value in alone.items())
    assert equal >= 0.99 * sum(value.numel() for value in alone.values())


@pytest.mark.slow
def test_processes_without_a_batch():
    (expected,) = rank_processes.run("few_batches", 1)
    for process in rank_processes.run("few_batches", 3):
        for name, values in expected["llama"]["tensors"].items():
            assert torch.equal(process["llama"]["tensors"][name], values)


@pytest.mark.slow
def test_from_files_as_in_memory(tmp_path):
    """The same bytes, and none half done; a run that is interrupted goes on to them."""
    with rank_processes.started("from_files", 2, tmp_path) as processes:
        for number, process in enumerate(processes):
            assert rank_processes.ended(process, rank_processes.SECONDS) == 0, rank_processes.printed(tmp_path, number)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in range(2))
    assert first == second
    for kind in ("llama", "mixtral"):
        assert first[kind] == ""
        assert first[f"{kind} written"]
        assert weights(tmp_path / f"{kind}-files") == weights(tmp_path / f"{kind}-memory")
    assert first["error"].startswith("InputError: ")
    assert not (tmp_path / "none").exists()
    assert first["interrupt"].startswith("KeyboardInterrupt")
    assert any(name.startswith("02-gptq-0000") for name in first["parts"])
    assert first["resumed"] == ""
    assert weights(tmp_path / "resumed") == weights(tmp_path / "llama-memory")
    assert not any((tmp_path / "scratch-0").iterdir())


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
