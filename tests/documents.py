"""Read and run the code blocks of Markdown files, with a tiny model in place of the one that they name."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mxcompile.cli.app import app

ROOT = Path(__file__).parent.parent
NAMED = "HuggingFaceTB/SmolLM2-135M-Instruct"
WIDE = {"COLUMNS": "160"}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_VARYING = re.compile(r"(absmax|sha)=\S+")  # digits that depend on the machine


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str


def read(path: Path) -> list[Block]:
    """The fenced blocks of a file that name a language."""
    return [Block(*found) for found in _BLOCK.findall(path.read_text())]


def blocks(path: Path, language: str) -> list[str]:
    """The texts of those in one language."""
    return [block.text for block in read(path) if block.language == language]


def block(path: Path, language: str, marker: str) -> str:
    """The text of the one block in a language that contains a marker: a command, or a name in it."""
    (text,) = (text for text in blocks(path, language) if marker in text)
    return text


def run_python(text: str, name: str, namespace: dict[str, Any], model: Path) -> None:
    """Execute a block with the model at a path in place of the one that the block names."""
    exec(compile(text.replace(NAMED, str(model)), name, "exec", dont_inherit=True), namespace)


def run_command(line: str) -> str:
    """Run `mxcompile ...` and return what it prints."""
    program, *arguments = shlex.split(line)
    assert program == "mxcompile", line
    result = CliRunner().invoke(app, arguments, env=WIDE)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def run_page(path: Path, model: Path) -> None:
    """Run the blocks of a page in order: python in one namespace, sh line by line; text is what that has printed."""
    namespace: dict[str, Any] = {"__name__": path.stem}
    printed = ""
    for block in read(path):
        match block.language:
            case "python":
                run_python(block.text, path.name, namespace, model)
            case "sh":
                commands = block.text.replace(NAMED, str(model)).splitlines()
                printed = "".join(map(run_command, commands))
            case "text":
                shown = {_plain(line) for line in printed.splitlines()}
                missing = [line for line in block.text.splitlines() if _plain(line) not in shown]
                assert not missing, f"{path.name}: not printed: {missing}"
            case other:
                raise AssertionError(f"{path.name}: a block of {other!r} would not be run")


def _plain(line: str) -> str:
    return _VARYING.sub(r"\1", " ".join(line.split()))
