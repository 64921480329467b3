"""Write the page of a study: a plot of bytes and KL with the front, and a table, for each model and text.

Like the page of a dump it needs nothing but a browser; names are escaped, and scripts set text, never HTML.
"""

from pathlib import Path
from typing import Any

from mxcompile.atomic_files import atomic_file
from mxcompile.diagnostics.report.page import render

_SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js"), ("study.js",)
_STYLES = ("page.css",)


def print_study_page(content: dict[str, Any]) -> str:
    """The text of the page. content: {"name", "groups": [{"title", "float", "cells": [...]}]}, as plain values."""
    return render("study.html", _SCRIPTS, _STYLES, content=content)


def write_study_page(folder: Path, content: dict[str, Any]) -> Path:
    """Write `index.html` in a folder; returns its path."""
    page = folder / "index.html"
    with atomic_file(page) as staged:
        staged.write_text(print_study_page(content), encoding="utf-8")
    return page
