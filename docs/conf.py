"""Sphinx configuration: `sphinx-build -W docs out/site`. Neither the build nor the pages need a network."""

import inspect
import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent

project = "mxcompile"
author = ""
copyright = ""
version = release = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"]
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


def _documented_names(subject: Any) -> set[str]:
    """Names that a docstring may explain line by line: parameters, and fields of a dataclass."""
    names = {*getattr(subject, "__dataclass_fields__", ()), *getattr(subject, "__annotations__", ())}
    with suppress(TypeError, ValueError):
        names |= set(inspect.signature(subject).parameters)
    return names


def _one_a_line(lines: list[str], names: set[str]) -> list[str]:
    """`device: of the model. recipe: its name` -> two lines, where both are documented names."""
    any_name = "|".join(map(re.escape, names))
    split = re.compile(rf"(?<=[.;]) (?=(?:{any_name})(?:, (?:{any_name}))*: )") if names else None
    return [part for line in lines for part in (split.split(line) if split else [line])]


def _as_fields(_app: object, kind: str, _name: str, subject: object, _options: object, lines: list[str]) -> None:
    """`recipe: a name` with its continuation lines -> a definition list; indented text -> a literal block."""
    names, result, inside = _documented_names(subject), list[str](), False
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


def _link_to_code(text: str) -> str:
    """Links to folders and pages outside of docs become plain code: the site does not have them."""
    return re.sub(r"\[`?([^\]`]+)`?\]\(\.\./(?:benchmarks|docs)/[\w/]+(?:\.md)?\)", r"`\1`", text)


def _on_source(_app: object, _name: object, content: list[str]) -> None:
    content[0] = _link_to_code(content[0])


def _on_include(_app: object, _path: object, _parent: object, content: list[str]) -> None:
    content[0] = _link_to_code(content[0])


def setup(app: Any) -> None:
    """Connect the handlers; Sphinx calls this."""
    app.connect("autodoc-process-docstring", _as_fields)
    app.connect("source-read", _on_source)
    app.connect("include-read", _on_include)
