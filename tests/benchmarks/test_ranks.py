"""The benchmark of several processes on a tiny model, and what it makes of the numbers of its runs."""

import json

import pytest
from ranks import compared, main, parsed


def of_run(gptq, whole, **tensors):
    return {"gptq": gptq, "whole": whole, "tensors": tensors, "peak": 0}


def test_the_fastest_runs_are_compared():
    alone = [of_run(8.0, 10.0, a="1", b="2"), of_run(6.0, 12.0, a="1", b="2")]
    several = [of_run(4.0, 8.0, a="1", b="3"), of_run(5.0, 5.0, a="1", b="3")]
    record = compared(alone, several)
    assert (record["gptq seconds, 1 process"], record["gptq seconds"], record["gptq speedup"]) == (6.0, 4.0, 1.5)
    assert (record["whole seconds, 1 process"], record["whole seconds"], record["whole speedup"]) == (10.0, 5.0, 2.0)
    assert (record["same bytes"], record["tensors alike"], record["tensors"]) == (True, 1, 2)
    assert not compared(alone, [several[0], alone[0]])["same bytes"]


@pytest.mark.parametrize("wrong", ["--processes 1", "--repeats 1", "--layers 0"])
def test_numbers_that_measure_nothing_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed(wrong.split())
    assert "--processes and --repeats are at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_on_a_tiny_model(local_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ranks.help_text", lambda: "The capital of France is Paris . " * 40)
    options = ["--model", str(local_model), "--windows", "8", "--length", "16", "--layers", "1"]
    monkeypatch.setattr("sys.argv", ["ranks.py", *options, "--out", str(tmp_path / "records.jsonl")])
    main()
    printed = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "records.jsonl").read_text() == printed + "\n"
    record = json.loads(printed)
    assert record["same bytes"] is True
    assert record["tensors alike"] > record["tensors"] // 2
    assert 0 <= record["distance"] < 0.5
    assert min(record["gptq seconds"], record["gptq seconds, 1 process"]) > 0
    assert (record["processes"], record["layers"], record["windows"]) == (2, 1, 8)
