"""The benchmark of a model larger than a GPU, on a tiny one: what it does in which order; engines are replaced."""

import json
from threading import Lock

import llama_70b
import torch
from safetensors import safe_open
from serving_engine import EngineProcess

import mxcompile


def test_every_part_is_a_record(tmp_path, monkeypatch):
    events, asked = [], {}

    class Engine(EngineProcess):
        def start(self):
            events.append(f"start {self._model.name}")
            asked[self._model.name] = self._asked

        def wait_until_ready(self):
            pass

        def measure(self):
            if self._model.name == "one-layer":
                self.start()
            assert json.loads((self._model / "config.json").read_text())["num_hidden_layers"] in (1, 2)
            events.append(f"measure {self._model.name}")
            values = {"log_probabilities": [[-4.0] * 63] * 4} if self._asked["compare"] else {}
            return {"step_ms": {"1": 1.0}, **values}

    one_at_a_time = Lock()  # torch's default dtype, which transformers sets for a while, is that of all threads

    def quantize(source, out, options, *, workers):
        with one_at_a_time:
            plan = mxcompile.quantize_files(source, out, recipe="w4a16-mxfp-quick", workers=workers)
        return {"result bytes": sum(each.after for each in plan.tensors)}

    monkeypatch.setattr(llama_70b, "EngineProcess", Engine)
    monkeypatch.setattr(llama_70b, "quantize", quantize)

    def measured(small, real, processes, limit):
        assert limit == 240
        if processes > 1:
            raise SystemExit("the run failed with 1")
        return {"seconds": 1, "until": real["until"]}

    monkeypatch.setattr(llama_70b.low_memory, "measured", measured)
    out = tmp_path / "records.jsonl"
    words = ["--work", tmp_path / "work", "--size", "tiny", "--layers", "2", "--device", "cpu", "--out", out]

    def run(parts):
        options = ["--workers", "1", "--long", "16", "--filled", "1", "--parts", parts]
        monkeypatch.setattr("sys.argv", ["llama_70b.py", *map(str, words), *options])
        return llama_70b.main()

    assert [run("files"), run("engines")] == [0, 1]  # gptq in several processes fails
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(each["what"] for each in records) == [
        *("compare", "gptq", "gptq", "load", "one layer", "quantize", "serve", "serve", "write")
    ]
    by_name = {each["what"]: each for each in records}
    assert by_name["write"]["bytes"] > 2 * by_name["quantize"]["result bytes"]
    alone, failed = (each for each in records if each["what"] == "gptq")
    assert (alone["processes"], alone["until"]) == (1, 2)
    assert (failed["processes"], failed["failed"]) == (2, "the run failed with 1")
    assert by_name["compare"]["distance"] > by_name["compare"]["own_distance"] >= 0
    assert events.index("start one-layer") < events.index("start quantized")
    assert "start bf16" in events
    assert events[-2:] == ["measure quantized", "measure bf16"]
    assert asked["bf16"]["options"]["load_format"] == "dummy"
    assert asked["quantized"]["options"]["kv_cache_memory_bytes"] > 0
    assert torch.get_num_threads() == 1
    first, second = (stored(tmp_path / "work" / "source", f"model.layers.{layer}.mlp.up_proj.weight") for layer in "01")
    assert first.shape == second.shape == (128, 64)
    assert first.any()
    assert not second.any()


def stored(folder, name):
    """A tensor of a checkpoint."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(folder / file, "pt") as tensors:
        return tensors.get_tensor(name)
