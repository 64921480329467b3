"""What README.md and passes/README.md say is run: every code block, and CI installs with README's own command."""

import json
import re
import shlex
from typing import Any

import torch
from documents import ROOT, blocks, run_python
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli.app import app
from mxcompile.cli.model_source import load_model

README = (ROOT / "README.md").read_text()


def test_python_blocks_and_the_commands_that_read_their_dump(local_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks(ROOT / "README.md", "python"):
        run_python(block, "README.md", namespace, local_model)
    assert "w4a8-mxint-quick 7 weights, largest change of a logit" in capsys.readouterr().out
    for line in blocks(ROOT / "README.md", "bash")[2].splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, line
        assert "model.layers.0" in result.output or "lower-mx" in result.output, line


def test_demo_runs_on_a_local_model(local_model, tmp_path):
    """The demo of the first command, on a model that needs no download, uncompiled."""
    options = f"--out {tmp_path / 'demo'} --length 32 --windows 2 --new-tokens 4 --no-compile"
    result = CliRunner().invoke(app, ["demo", str(local_model), *shlex.split(options)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = re.findall(
        r"^ +(float|w8a8-mxint|w4a8-mxint-quick) +([\d.]+) +(\d+)% +([\d.]+) ", result.output, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["float", "w8a8-mxint", "w4a8-mxint-quick"]
    assert 100 == int(rows[0][2]) > int(rows[1][2]) > int(rows[2][2])
    assert (tmp_path / "demo" / "w4a8-mxint-quick" / "02-lower-mx.txt").exists()


def test_the_command_that_evaluates(local_model, monkeypatch):
    monkeypatch.setattr("mxcompile.cli.smollm2.load", lambda: load_model(str(local_model)))
    (line,) = blocks(ROOT / "README.md", "bash")[3].splitlines()
    result = CliRunner().invoke(app, shlex.split(line)[1:], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "510 tokens of Python's help topics, 2 windows of 256\n" in result.output
    assert re.search(r"^ +w4a8-mxint-quick +[\d.]+ +[\d.]+ +[+-][\d.]+% +[\d.]+ +[\d.]+%", result.output, re.MULTILINE)


def test_the_command_that_bisects(local_model, monkeypatch):
    monkeypatch.setattr("mxcompile.cli.smollm2.load", lambda: load_model(str(local_model)))
    (line,) = blocks(ROOT / "README.md", "bash")[4].splitlines()
    result = CliRunner().invoke(app, shlex.split(line.replace("--kl 0.3", "--kl 0.001"))[1:], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "to blame" in result.output


def test_the_commands_about_checkpoints(local_model, tmp_path, monkeypatch):
    """On a model whose predictions are close to each other: it recovers less than the real one. The last command needs
    a network, and is tested in `test_commands.py`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mxcompile.cli.smollm2.load", lambda: load_model(str(local_model)))
    quantize, generate, inspect, evaluate, harness = blocks(ROOT / "README.md", "bash")[5].splitlines()
    shown = {
        f"{quantize} --force": "written to out/model",
        generate: "The capital of France is",
        inspect: "mxint8",
        evaluate: "top-1",
    }
    for line, words in shown.items():
        result = CliRunner().invoke(app, shlex.split(line)[1:], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        assert words in result.output
    assert harness.startswith("mxcompile lm-eval --model hf --model_args pretrained=out/model ")


def test_the_commands_that_convert(local_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(str(local_model))
    example = tokenizer("The capital", return_tensors="pt")
    quantized = mxcompile.quantize_and_compile(model, example, recipe="w4a16-mxfp-quick", compile=False)
    mxcompile.save(quantized, "out/mxfp4", tokenizer=tokenizer, format="compressed-tensors")
    for line in blocks(ROOT / "README.md", "bash")[6].splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        assert f"written to {line.split()[-1]}" in result.output
    weight = mxcompile.load("out/again.gguf").model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight.dequantize(), quantized.model.layers[0].mlp.up_proj.weight.dequantize())


def test_ci_installs_and_tests_as_readme_says():
    install, tests = blocks(ROOT / "README.md", "bash")[1].strip().rsplit(" && ", 1)
    script = (ROOT / ".ci" / "run").read_text()
    assert install in script
    assert tests in script


def test_the_two_commands_differ_in_what_they_run_only():
    demo, tests = (block.strip() for block in blocks(ROOT / "README.md", "bash")[:2])
    assert demo == tests.replace("[test]", "[demo]").replace("python -m pytest", "mxcompile demo")


def test_writing_a_pass(tmp_path, monkeypatch, capsys):
    """The blocks one after the other, as a reader would type them; then the tests that they define."""
    monkeypatch.chdir(tmp_path)
    example, *others = blocks(ROOT / "passes" / "README.md", "python")
    assert example.count("\n") <= 30
    namespace: dict[str, Any] = {"__name__": "passes_readme"}
    for block in (example, *others):
        exec(compile(block, "passes/README.md", "exec", dont_inherit=True), namespace)
    assert "worst-layers{share=0.5} 1 rewrites, 0 misses {'2.weight': {'sqnr_db':" in capsys.readouterr().out
    assert [namespace["quantized"][index].weight.layout_.format for index in (0, 2)] == ["mxint4", "mxint8"]
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    for line in re.findall(r"`mxcompile ((?:show|diff|passes) [^`]*)`", (ROOT / "passes" / "README.md").read_text()):
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, line
    assert example[example.index("@dataclass") :] in (ROOT / "docs" / "examples" / "custom_pass.py").read_text()


def test_the_architecture_table_is_the_measured_one():
    table = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    records = [json.loads(line) for line in (ROOT / "benchmarks/results/folds.jsonl").read_text().splitlines()]
    keys = ("architecture", "groups", "folded", "multiplied", "skipped")
    assert table == [tuple(str(record[key]) for key in keys) for record in records]
    assert min(min(record["sqnr_db_smooth"], record["sqnr_db_awq"]) for record in records) > 111


ACCURACY = (
    "rtn",
    "smooth-quant",
    "smooth-quant searched",
    "awq-fold",
    "awq-fold + gptq",
    "awq-fold + gptq + tune-vectors",
)


def test_the_accuracy_table_is_the_measured_one():
    """The gap of every pair of formats, and the shares closed; a dash where nothing was measured."""
    records = results("accuracy.jsonl")
    text = (ROOT / "README.md").read_text()
    for pair in dict.fromkeys((r["weight"], r["activation"]) for r in records if r["rtn_nll"]):
        rows = {
            r["recipe"]: r
            for r in records
            if (r["weight"], r["activation"], r["model"]) == (*pair, "SmolLM2-135M-Instruct")
        }
        first = next(iter(rows.values()))
        shares = [percent(rows[name]["gap_closed"]) if name in rows else "-" for name in ACCURACY]
        gap = first["rtn_nll"] - first["float_nll"]
        assert f"| {pair[0]}, {pair[1]} | {gap:.3f} | {' | '.join(shares)} |" in text


def test_the_study_is_the_measured_one():
    text = (ROOT / "docs" / "study.md").read_text()
    for row in results("study.jsonl"):
        values = row["perplexity"].values()
        cells = [f"**{value:.2f}**" if value == min(values) else f"{value:.2f}" for value in values]
        assert f"| {row['weight']} | {row['gptq']} | {' | '.join(cells)} |" in text


def test_the_times_of_a_large_model_are_the_measured_ones():
    rows = {row["pipeline"]: row for row in results("large-h100.jsonl")}
    text = (ROOT / "README.md").read_text()
    assert f"{rows['rtn']['seconds_32_layers']:.0f} s to round" in text
    assert f"{rows['gptq']['seconds_32_layers']:.0f} s with `gptq`" in text
    assert f"at most {rows['gptq']['peak_gib_32_layers']:.1f} GiB" in text


def test_other_projects_numbers_are_the_measured_ones():
    """Every row of the table, the best first."""
    rows = {row["row"]: row for row in results("peers.jsonl")}
    names = {
        "mxfp4, mxcompile: `awq-fold`, `gptq`, `tune-vectors`": "mxcompile-tuned-mxfp4",
        "mxfp4, mxcompile: `awq-fold`, `gptq`": "mxcompile-gptq-mxfp4",
        "mxfp4, auto-round {version}": "auto-round-signed-gradient-mxfp4",
        "mxfp4, llm-compressor {version}, GPTQ": "llm-compressor-gptq-mxfp4",
        "int4 in groups of 32, llm-compressor {version}, GPTQ": "llm-compressor-gptq-int4",
        "mxfp4, torchao {version}, rounded": "torchao-rtn-rceil-mxfp4",
        "int4 in groups of 32, torchao {version}, rounded": "torchao-rtn-int4",
    }
    for text, name in names.items():
        row = rows[name]
        cells = (text.format(**row), f"{row['bits']:g}", f"{row['perplexity']:.2f}", f"{100 * row['gap_closed']:.0f} %")
        assert f"| {' | '.join(cells)} |" in README
        assert row["text"] == "wikitext2-validation.txt, second half"


def test_the_tokens_a_second_on_the_cpu_are_the_measured_ones():
    """Ratios are to the faster of the two float ways in the same dtype, compiled in all cases."""
    rows = {(row["way"], row["dtype"]): row for row in results("decode-cpu.jsonl")}
    ways = {
        "float, eager": "float eager",
        "float, compiled": "float compiled",
        "`w4a8-mxint-quick`": "w4a8-mxint-quick",
        "the same, output head in `mxint8`": "w4a8-mxint-quick, head mxint8",
        "`w8a8-mxint` (before the last changes)": "w8a8-mxint",
    }
    given = re.findall(r"^\| (.*) \| (b?float\d+) \| (.*) \| (.*) \|$", README, re.MULTILINE)
    assert len(given) == 7
    for name, dtype, *cells in given:
        plain = rows["float compiled", dtype]
        for kind, digits, cell in zip(("decode", "prefill"), (1, 0), cells, strict=True):
            value = rows[ways[name], dtype][kind]
            ratio = "" if name.startswith("float") else f" ({value / plain[kind]:.1f} x)"
            assert cell == f"{value:.{digits}f}{ratio}"
    llama = rows["llama.cpp", "q4_1"]
    assert f"| llama.cpp, Q4_1, output head in 8 bits | | {llama['decode']:.1f} | {llama['prefill']:.0f} |" in README


def layer_ratio(lines):
    """How many times as fast as cuBLAS the four products of a layer are together."""
    assert len({(line["n"], line["k"]) for line in lines}) == len(lines) == 4
    return sum(line["cublas_bf16_us"] for line in lines) / sum(line["us"] for line in lines)


def test_the_speeds_on_a_gpu_are_the_measured_ones():
    """All that were measured, ours and others'."""
    found = {}
    for line in results("gemm-h100.jsonl"):
        if "us" in line:
            who = "" if line["path"] in ("planes", "gluon", "dequantize+cublas") else f", {line['path']}"
            found.setdefault((line["weight"] + who, line["m"]), []).append(line)
    given = {}
    for name, cells in re.findall(r"^\| (mx\w+(?:, [^|]+)?) \|((?: [\d.]* ?x? ?\|){6})$", README, re.MULTILINE):
        for tokens, cell in zip((1, 16, 64, 256, 2048, 8192), cells.split("|"), strict=False):
            if cell.strip():
                given[name, tokens] = cell.strip()
    assert given == {key: f"{layer_ratio(lines):.2f} x" for key, lines in found.items()}


def test_the_ratios_at_the_rate_of_8_bits_are_the_measured_ones():
    text = " ".join(README.split())
    lines = results("fp8-h100.jsonl")
    for activation, words in (
        ("mxfp4", "{:.2f} x with weights in `mxint4`, {:.2f} x in `mxfp4`"),
        ("mxfp8_e4m3", "{:.2f} x and {:.2f} x with activations in `mxfp8_e4m3` aligned"),
    ):
        ours = [line for line in lines if line["activation"] == activation]
        ratios = [layer_ratio([line for line in ours if line["weight"] == name]) for name in ("mxint4", "mxfp4")]
        assert words.format(*ratios) in text
    lost = {(line["activation"], line["weight"], line["k"]): line["error"] / line["rounding"] for line in lines}
    assert all(ratio <= 1.2 for key, ratio in lost.items() if key[0] == "mxfp4" or key[2] == 4096)
    wide = [lost["mxfp8_e4m3", weight, 14336] for weight in ("mxint4", "mxfp4")]
    assert "lose {:.2f} and {:.2f} times what rounding to bfloat16 does".format(*wide) in text


def test_the_times_of_a_whole_model_are_the_measured_ones():
    plain, ours = results("decode-h100.jsonl")
    text = " ".join(README.split())
    for name, words in (
        ("token_ms", "{:.2f} ms a token in place of {:.2f}"),
        ("step_ms", "kernels {:.2f} ms in place of {:.2f}"),
        ("prefill_ms", "2048 tokens {:.1f} ms in place of {:.1f}"),
        ("gib", "{:.2f} GiB in place of {:.2f}"),
    ):
        assert words.format(ours[name], plain[name]) in text
    assert f"{ours['ratio']} times as many tokens" in text


def test_the_costs_of_checkpoints_are_the_measured_ones():
    row = results("saving.jsonl")[-1]
    text = (ROOT / "README.md").read_text()
    extra = row["weight file bytes"] - row["stored bytes"] + row["index bytes"]
    assert f"is {row['stored bytes'] / 1e6:.1f} MB (its embedding is float32), and {extra / 1e3:.0f} kB" in text
    for kind in ("verified", "unverified"):
        seconds, peak = row[f"{kind} load seconds"], row[f"{kind} peak over stored"]
        assert re.search(rf"{seconds:.2f} s and {peak:.2f} times", text)
    first, second = (row[f"{process} process forward seconds"] for process in ("first", "second"))
    assert f"at the first call, {first:.0f} s for SmolLM2" in text
    assert f"from torch's cache, in {second:.0f} s" in text


def results(name):
    return [json.loads(line) for line in (ROOT / "benchmarks/results" / name).read_text().splitlines()]


def percent(share):
    return f"{share:.0%}".replace("%", " %")
