"""Add the pass and the node to an error that a pass raised.

No pass has to report its node. The traceback keeps the local variables of every call between the pass and the error;
the innermost call with a node in a local variable, or with a Matmul, Match or Layer of one, was working on that node.
"""

import re
import traceback
from dataclasses import is_dataclass
from typing import Any

from torch.fx import Node

from mxcompile.errors import MXCompileError, PassError
from mxcompile.graph.program import where

_NODE_FIELDS = ("node", "root")  # in Matmul, Layer, UnquantizedNode; in Match


def add_location(error: Exception, pass_name: str) -> MXCompileError:
    """The error to raise from the pipeline.

    An MXCompileError keeps its type, and its message gets the name of the pass if it lacks it. Any other error becomes
    a PassError. The node is added to a message that names none.
    """
    node = last_node(error)
    at = "" if node is None else f", last at {where(node)}"
    if not isinstance(error, MXCompileError):
        failure = PassError(f"pass {pass_name!r} failed{at}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
    message = str(error)
    names_node = not isinstance(error, PassError) or "%" in message
    if not re.search(rf"(?<![\w-]){re.escape(pass_name)}(?![\w-])", message):
        message = f"pass {pass_name!r}{'' if names_node else at}: {message}"
    elif not names_node and node is not None:
        message = f"{message} (at {where(node)})"
    error.args = (message, *error.args[1:])
    return error


def last_node(error: BaseException) -> Node | None:
    """The node in the local variables of the innermost call that has one, when the error was raised."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        nodes = [node for value in frame.f_locals.values() if (node := _node(value)) is not None]
        last = nodes[-1] if nodes else last
    return last


def _node(value: Any) -> Node | None:
    candidates = (getattr(value, name, None) for name in _NODE_FIELDS) if is_dataclass(value) else (value,)
    return next((candidate for candidate in candidates if isinstance(candidate, Node)), None)
