"""The error of a pass -> one that names the pass and the node that it was at.

Which node that is, nobody has to say: Python keeps the local variables of every call between the pass and the error,
and the innermost call that holds a node, or something about one (a Matmul, a Match, a Layer), was busy with it.
"""

import re
import traceback
from dataclasses import is_dataclass
from typing import Any

from torch.fx import Node

from mxcompile.errors import MXCompileError, PassError
from mxcompile.graph.program import where

_ABOUT = ("node", "root")  # how dataclasses of ours call the node that they are about


def named(error: Exception, pass_name: str) -> MXCompileError:
    """The error as it leaves a pipeline.

    One of ours stays what it is and gets the pass into its message, where it is not named yet; any other becomes a
    PassError. The node is added to what does not say itself where it is.
    """
    node = last_node(error)
    at = "" if node is None else f", last at {where(node)}"
    if not isinstance(error, MXCompileError):
        failure = PassError(f"pass {pass_name!r} failed{at}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
    message = str(error)
    says_where = not isinstance(error, PassError) or "%" in message
    if not re.search(rf"(?<![\w-]){re.escape(pass_name)}(?![\w-])", message):
        message = f"pass {pass_name!r}{'' if says_where else at}: {message}"
    elif not says_where and node is not None:
        message = f"{message} (at {where(node)})"
    error.args = (message, *error.args[1:])
    return error


def last_node(error: BaseException) -> Node | None:
    """The node that the innermost call had in hand when the error was raised, if there was one."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        held = [node for value in frame.f_locals.values() if (node := _node(value)) is not None]
        found = held[-1] if held else found
    return found


def _node(value: Any) -> Node | None:
    parts = (getattr(value, name, None) for name in _ABOUT) if is_dataclass(value) else (value,)
    return next((part for part in parts if isinstance(part, Node)), None)
