"""How Sphinx builds these pages: `sphinx-build -W docs out/site`. Needs no network, neither do the pages."""

import inspect
import re
from contextlib import suppress
from typing import Any

project = "mxcompile"
author = ""
copyright = ""
version = release = "0.1"
html_title = "mxcompile"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["guide.css"]
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "github-dark"
myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "colon_fence"]
default_role = "code"  # docstrings write `code` with one backtick
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

_NAMES = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")


def _documented(given: Any) -> set[str]:
    """Names that a docstring may explain line by line: parameters, and fields of a dataclass."""
    names = {*getattr(given, "__dataclass_fields__", ()), *getattr(given, "__annotations__", ())}
    with suppress(TypeError, ValueError):
        names |= set(inspect.signature(given).parameters)
    return names


def _one_a_line(lines: list[str], names: set[str]) -> list[str]:
    """`device: of the model. recipe: its name` -> two lines, where both are names to be explained."""
    known = "|".join(map(re.escape, names))
    split = re.compile(rf"(?<=[.;]) (?=(?:{known})(?:, (?:{known}))*: )") if names else None
    return [part for line in lines for part in (split.split(line) if split else [line])]


def _as_fields(_app: object, kind: str, _name: str, given: object, _options: object, lines: list[str]) -> None:
    """`recipe: a name` with its hanging lines -> a definition list; what is indented -> a literal block."""
    names, result, inside = _documented(given), list[str](), False
    if kind == "module":
        names.clear()
    for line in _one_a_line(lines, names):
        match = _NAMES.match(line)
        if match and (inside or set(match[1].split(", ")) & names):
            result += [""] * bool(not inside and result and result[-1])
            result += [", ".join(f"``{name}``" for name in match[1].split(", ")), f"    {match[2]}"]
            inside = True
        elif inside and line[:1].isupper():
            result += ["", line]
            inside = False
        elif inside:
            result.append(f"    {line.strip()}" if line else line)
            inside = bool(line)
        else:
            if line.startswith("    ") and (not result or not result[-1]):
                result += ["::", ""]
            result.append(line if "`" in line or line.startswith("    ") else re.sub(r"[*|]", r"\\\g<0>", line))
    lines[:] = result


def _without_folders(_app: object, _path: object, _parent: object, content: list[str]) -> None:
    """A link to a folder of the repository is no link on these pages."""
    content[0] = re.sub(r"\[([^\]]+)\]\(\.\./docs/\w+\)", r"`\1`", content[0])


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", _as_fields)
    app.connect("include-read", _without_folders)
