"""The command line app: each file of `commands/` registers its own."""

import inspect
import re
import sys
import time
import warnings

import typer
from rich.text import Text

from mxcompile.calibration.ranks.process_group import is_first, launched
from mxcompile.cli.commands import dumps, evaluate, lists, models, quantize, serve, study
from mxcompile.cli.console import messages, warnings_as_messages
from mxcompile.errors import InputError, MXCompileError

_PRINTING = 2.0  # seconds

app = typer.Typer(
    help="Quantize PyTorch models to Microscaling (MX) formats.", no_args_is_help=True, pretty_exceptions_enable=False
)
for _commands in (evaluate, quantize, models, serve, study, dumps, lists):
    _commands.register(app)
for _command in app.registered_commands:
    # Typer keeps the line breaks of a docstring behind its first paragraph: only those after a sentence or before an
    # option are meant
    _command.help = re.sub(r"(?<![.:\n])\n(?!\n|--)", " ", inspect.getdoc(_command.callback) or "")


def main() -> None:
    """Entry point: an `MXCompileError` is printed as one message and its notes, without a traceback."""
    try:
        if launched() and sys.argv[1:2] not in (["quantize"], ["--help"]):
            raise InputError("torchrun is for mxcompile quantize: start other commands without it")
        if not is_first():
            warnings.simplefilter("ignore")  # the first process gives the same
        with warnings_as_messages():
            app()
    except MXCompileError as error:
        screen = messages()
        screen.print(Text(f"error: {error}", style="red"))
        for note in getattr(
            error, "__notes__", ()
        ):  # that of a failed run says what is left, which ends with a command
            screen.print(Text(f"{'note' if error.unfinished is None else 'in Python'}: {note}"))
        if not is_first():
            time.sleep(_PRINTING)  # torchrun ends all processes when the first of them has ended
        raise SystemExit(1) from None
