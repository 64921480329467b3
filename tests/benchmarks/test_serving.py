"""The benchmark of serving: what it makes of times, logs and failures; engines are replaced."""

import json
import sys
from types import SimpleNamespace

import pytest
import serving
import serving_engine
import torch
from serving import BF16, MARLIN, VARIANTS, compared, with_ratios
from serving_engine import EngineProcess, from_log, ids, step_ms

ASKED = {"waits": False, "limit": 60} | {
    "batches": [1, 2],
    "prompt": 8,
    "long": 16,
    "steps": 4,
    "rounds": 2,
    "eager": True,
    "vocabulary": 512,
}
SMALL = ["--size", "small", "--layers", "1", "--batches", "1,2", "--steps", "4"]


def row(variant, *times, prompt=40.0):
    return {"variant": variant, "step_ms": dict(zip(("1", "8"), times, strict=True)), "prompt_ms": prompt}


def test_ratios_are_over_both_baselines():
    rows = [row(BF16, 4.0, 8.0), row(MARLIN, 2.0, 8.0), {"variant": "mxfp4", "failed": "status 1"}]
    ratios = [with_ratios(each, rows[:n]) for n, each in enumerate(rows)]
    assert ratios[0]["over_bf16"] == {"1": 1.0, "8": 1.0, "prompt": 1.0}
    assert ratios[1]["over_bf16"] == {"1": 2.0, "8": 1.0, "prompt": 1.0}
    assert ratios[2] == rows[2]
    ours = with_ratios(row("mxfp4", 1.0, 10.0, prompt=20.0), rows)
    assert ours["over_marlin"] == {"1": 2.0, "8": 0.8, "prompt": 2.0}
    assert "over_marlin" not in with_ratios(row("mxfp4", 1.0, 1.0), [{"variant": MARLIN, "failed": "status 1"}])


def test_the_log_names_kernels_and_late_compilations():
    printed = """INFO [kernels.py:1028] Using MarlinMxFp4LinearKernel for MXFP4 GEMM
WARNING [jit_monitor.py:140] Triton kernel JIT compilation during inference: _planes_kernel. This causes a latency spike
WARNING [jit_monitor.py:140] Triton kernel JIT compilation during inference: _planes_kernel. This causes a latency spike
"""
    assert from_log(printed) == {
        "kernels": ["MarlinMxFp4LinearKernel (MXFP4)"],
        "compiled_late": ["_planes_kernel"],
    }


class Engine:
    """Takes 10 s for a prefill and 2 s for each token, by a clock of its own."""

    def __init__(self):
        self.now = 0.0

    def generate(self, prompts, sampling, use_tqdm):
        self.now += 10 + 2 * sampling.max_tokens
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * sampling.max_tokens)]) for _ in prompts]


@pytest.fixture
def engine(monkeypatch):
    engine = Engine()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setattr(serving_engine, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    return engine


def test_a_step_is_what_more_tokens_take(engine):
    assert step_ms(engine, ASKED, batch=2) == pytest.approx(2000)


def test_tokens_that_are_missing_are_an_error(engine, monkeypatch):
    monkeypatch.setattr(
        engine, "generate", lambda *_, **__: [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0])])]
    )
    with pytest.raises(RuntimeError, match="generated"):
        step_ms(engine, ASKED, batch=1)


def test_prompts_are_the_same_for_every_engine_and_differ_among_themselves():
    first, second = ids(2, 32, 512)
    assert [first, second] == ids(2, 32, 512)
    assert first != second


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit('no kernel')", "status 1: no kernel"), ("", "status 0")]
)
def test_an_engine_that_fails_is_a_row_with_the_end_of_its_log(code, expected, tmp_path, monkeypatch):
    assert of_script(code, tmp_path, monkeypatch).measure()["failed"].startswith(expected)


def of_script(code, tmp_path, monkeypatch, **asked):
    script = tmp_path / "engine.py"
    script.write_text(code)
    monkeypatch.setattr(serving_engine, "__file__", str(script))
    return EngineProcess(tmp_path / "model", ASKED | asked)


def test_an_engine_that_hangs_is_stopped(tmp_path, monkeypatch):
    engine = of_script("import time; time.sleep(600)", tmp_path, monkeypatch, limit=1)
    assert engine.measure()["failed"].startswith("stopped after 1 s")


WAITING = """
import json, pathlib, sys, time
asked = json.loads(pathlib.Path(sys.argv[1]).read_text())
pathlib.Path(asked["ready"]).touch()
while not pathlib.Path(asked["go"]).exists():
    time.sleep(0.01)
pathlib.Path(sys.argv[2]).write_text(json.dumps({"asked": asked["batches"]}))
"""


def test_engines_that_start_together_wait_to_be_measured(tmp_path, monkeypatch):
    engine = of_script(WAITING, tmp_path, monkeypatch, waits=True)
    engine.start()
    engine.wait_until_ready()
    assert not (tmp_path / "model.result.json").exists()
    assert engine.measure() == {"asked": [1, 2], "kernels": [], "compiled_late": []}
    engine.stop()


def test_an_engine_that_never_becomes_ready_is_a_row(tmp_path, monkeypatch):
    engine = of_script("import time; time.sleep(600)", tmp_path, monkeypatch, waits=True, limit=1)
    engine.start()
    engine.wait_until_ready()
    assert engine.measure()["failed"].startswith("status -15")


def test_distances_are_of_the_prompts_tokens():
    expected = [torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])]
    row = compared({"log_probabilities": [[-1.0, -2.25]], "step_ms": {}}, expected)
    assert row == {"step_ms": {}, "distance": 0.125, "own_distance": 0.25}
    assert compared({"failed": "status 1"}, expected) == {"failed": "status 1"}


@pytest.mark.parametrize("more", [[], ["--together", "--compare"]])
def test_a_run_writes_a_row_for_each_variant(more, tmp_path, monkeypatch, capsys):
    """Its checkpoints are real ones."""
    asked, started = [], []

    class Measured(EngineProcess):
        def start(self):
            started.append(self._model.name)

        def wait_until_ready(self):
            assert len(started) == len(VARIANTS)

        def measure(self):
            config = json.loads((self._model / "config.json").read_text())
            method = config.get("quantization_config", {}).get("quant_method")
            asked.append((self._model.name, method, self._asked["options"]["load_format"]))
            assert config["architectures"] == ["LlamaForCausalLM"]
            assert (self._model / "model.safetensors").exists() or self._model.name != BF16 or not more
            return {"step_ms": {"1": 1.0, "2": 2.0}, "prompt_ms": 3.0, "log_probabilities": [[-6.0] * 63] * 4}

    monkeypatch.setattr(serving, "EngineProcess", Measured)
    assert serving.main([*SMALL, *more, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [each["variant"] for each in rows] == list(VARIANTS)
    assert asked == [
        ("bf16", None, "auto" if more else "dummy"),
        ("marlin", "compressed-tensors", "auto"),
        ("mxfp4", "mxcompile", "auto"),
        ("w4a8", "mxcompile", "auto"),
    ]
    assert rows[3]["over_marlin"] == {"1": 1.0, "2": 1.0, "prompt": 1.0}
    assert all((each.get("distance", 0) > each.get("own_distance", 0)) == bool(more) for each in rows)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["w4a8", "1.00", "2.00", "3.00"]
