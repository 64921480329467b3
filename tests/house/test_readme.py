"""Run the code blocks of README.md and passes/README.md, and check what the pages name: commands, files, links."""

import re
import shlex
from typing import Any

import pytest
import torch
from documents import ROOT, WIDE, block, blocks, run_command, run_python
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.cli.app import app
from mxcompile.cli.model_source import load_model

README = ROOT / "README.md"
SAVING = ROOT / "docs" / "saving.md"
PASSES = ROOT / "passes" / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", PASSES, *sorted((ROOT / "docs").rglob("*.md")))


@pytest.fixture
def smollm2_is_local(local_model, monkeypatch):
    """Where a command names no model, it takes the tiny local one."""
    monkeypatch.setattr("mxcompile.cli.smollm2.load", lambda: load_model(str(local_model)))


@pytest.mark.slow
def test_python_blocks_and_the_commands_that_read_their_dump(local_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for text in blocks(README, "python"):
        run_python(text, "README.md", namespace, local_model)
    printed = [run_command(line) for line in block(README, "bash", "mxcompile show").splitlines()]
    assert "lower-mx" in printed[0]
    assert all("model.layers.0" in text for text in printed[1:])
    shown = block(README, "diff", "mx.quantize").splitlines()
    lines = {_without_sizes(line) for line in printed[-1].splitlines()}
    assert len(shown) == 6
    assert not [line for line in shown if not any(each.startswith(_without_sizes(line)) for each in lines)]
    layouts = [module.weight.layout_.format for module in namespace["mixed"].modules() if _is_quantized(module)]
    assert sorted(layouts) == ["mxint4"] * 4 + ["mxint8"] * 3


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.cached_file().exists(), reason="SmolLM2 is not in the cache")
def test_the_first_example_prints_what_is_said(tmp_path, monkeypatch, capsys):
    """On the real model, uncompiled; its diff is the one that is shown, sizes included."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = smollm2.load()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: model)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: tokenizer)
    text = block(README, "python", 'recipe="w8a8-mxint-quick"').replace("dump=", "compile=False, dump=")
    capsys.readouterr()
    run_python(text, "README.md", {}, tmp_path)
    assert block(README, "text", "capital").strip() in capsys.readouterr().out
    printed = run_command(block(README, "bash", "mxcompile diff").splitlines()[-1]).splitlines()
    lines = {" ".join(line.split()) for line in printed}
    assert not [
        line
        for line in block(README, "diff", "mx.quantize").splitlines()
        if not any(each.startswith(line) for each in lines)
    ]


def test_demo_runs_on_a_local_model(local_model, tmp_path):
    """The demo of the first command, on a model that needs no download, uncompiled."""
    options = f"--out {tmp_path / 'demo'} --length 32 --windows 2 --new-tokens 4 --no-compile"
    result = CliRunner().invoke(app, ["demo", str(local_model), *shlex.split(options)], env=WIDE)
    assert result.exit_code == 0, result.output
    rows = re.findall(
        r"^ +(float|w8a8-mxint-quick|w4a8-mxint-quick) +([\d.]+) +(\d+)% +([\d.]+) ", result.output, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["float", "w8a8-mxint-quick", "w4a8-mxint-quick"]
    assert 100 == int(rows[0][2]) > int(rows[1][2]) > int(rows[2][2])
    assert (tmp_path / "demo" / "w4a8-mxint-quick" / "02-lower-mx.txt").exists()


@pytest.mark.usefixtures("smollm2_is_local")
def test_the_commands_that_measure():
    evaluate, bisect, explain = block(README, "bash", "mxcompile eval").splitlines()
    printed = run_command(evaluate)
    assert "510 tokens of Python's help topics, 2 windows of 256\n" in printed
    assert re.search(r"^ +w4a8-mxint-quick +[\d.]+ +[\d.]+ +[+-][\d.]+% +[\d.]+ +[\d.]+%", printed, re.MULTILINE)
    assert "to blame" in run_command(bisect.replace("--kl 0.3", "--kl 0.001"))
    assert "self_attn.q_proj" in run_command(explain)


@pytest.mark.usefixtures("smollm2_is_local")
def test_the_commands_about_checkpoints(tmp_path, monkeypatch):
    """On a model whose predictions are close to each other: it recovers less than the real one. lm-eval needs a
    network, and is tested in `test_commands.py`.
    """
    monkeypatch.chdir(tmp_path)
    quantize, generate = block(README, "bash", "mxcompile quantize").splitlines()
    _, inspect, _, evaluate = block(SAVING, "sh", "mxcompile inspect").splitlines()
    shown = {
        f"{quantize} --force": "written to out/model",
        generate: "The capital of France is",
        inspect: "mxint8",
        evaluate: "top-1",
    }
    for line, words in shown.items():
        assert words in run_command(line)
    assert "`mxcompile lm-eval --model hf --model_args pretrained=out/model " in " ".join(SAVING.read_text().split())
    assert f"`{quantize}`" in " ".join(SAVING.read_text().split())


@pytest.mark.filterwarnings("ignore:this model is in float32, but compressed-tensors")
def test_the_commands_that_convert(local_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(str(local_model))
    example = tokenizer("The capital", return_tensors="pt")
    quantized = mxcompile.quantize_and_compile(model, example, recipe="w4a16-mxfp-quick", compile=False)
    mxcompile.save(quantized, "out/mxfp4", tokenizer=tokenizer, format="compressed-tensors")
    for line in block(SAVING, "sh", "mxcompile convert").splitlines():
        assert f"written to {line.split()[-1]}" in run_command(line)
    weight = mxcompile.load("out/again.gguf").model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight.dequantize(), quantized.model.layers[0].mlp.up_proj.weight.dequantize())


def test_ci_installs_and_tests_as_readme_says():
    install, tests = block(README, "bash", "pytest").strip().rsplit(" && ", 1)
    script = (ROOT / ".ci" / "run").read_text()
    assert install in script
    assert tests in script


def test_the_two_commands_differ_in_what_they_run_only():
    demo, tests = (block(README, "bash", marker).strip() for marker in ("mxcompile demo", "pytest"))
    assert demo == tests.replace("[test]", "[demo]").replace("python -m pytest", "mxcompile demo")


def test_writing_a_pass(tmp_path, monkeypatch, capsys):
    """The blocks one after the other, as a reader would type them; then the tests that they define."""
    monkeypatch.chdir(tmp_path)
    example = block(PASSES, "python", "class WorstLayers(Pass)")
    assert example.count("\n") <= 30
    assert blocks(PASSES, "python")[0] == example
    namespace: dict[str, Any] = {"__name__": "passes_readme"}
    for text in blocks(PASSES, "python"):
        exec(compile(text, "passes/README.md", "exec", dont_inherit=True), namespace)
    assert "worst-layers{share=0.5} 1 rewrites, 0 misses {'2.weight': {'sqnr_db':" in capsys.readouterr().out
    assert [namespace["quantized"][index].weight.layout_.format for index in (0, 2)] == ["mxint4", "mxint8"]
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    for line in re.findall(r"`(mxcompile (?:show|diff|passes) [^`]*)`", PASSES.read_text()):
        run_command(line)
    assert example[example.index("@dataclass") :] in (ROOT / "docs" / "examples" / "custom_pass.py").read_text()


def test_pre_commit_runs_the_ruff_of_the_test_extra():
    (pinned,) = re.findall(r'"(ruff==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    hooks = re.findall(r'"(ruff==[\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == [pinned, pinned]


def test_readme_is_one_screen():
    assert README.read_text().count("\n") <= 160
    (passes,) = re.findall(
        r"^@dataclass.*?return PassResult", block(README, "python", "Pass)"), re.MULTILINE | re.DOTALL
    )
    assert passes.count("\n") + 1 <= 15


def test_the_picture_is_small():
    path = ROOT / "docs" / "static" / "report.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 250_000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_links_that_a_page_names_exist(page):
    text = page.read_text()
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert not [target for target in targets if not (page.parent / target).exists()]
    folders = "benchmarks|docs|mxcompile|passes|tests"
    paths = set(re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+\.(?:py|md|jsonl|cpp|png|svg)\b", text))
    assert not [path for path in paths if not (ROOT / path).exists()]


def _is_quantized(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), mxcompile.MXWeight)


def _without_sizes(line: str) -> str:
    """Without what differs between models: numbers that stand alone, and the width of columns."""
    return " ".join(re.sub(r"\b\d+\b", "N", line).split())
