"""The key of compiled graphs in Inductor's cache: it changes with every file that decides what they compute."""

import ast
from pathlib import Path

import mxcompile
from mxcompile.inductor import backend

PACKAGE = Path(mxcompile.__file__).parent
NO_NUMBERS = {PACKAGE / name for name in ("errors.py", "arguments.py", "atomic_files.py")}


def imported(file: Path) -> set[Path]:
    """The package's files that a file imports, also inside functions."""
    files: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            if module.startswith("mxcompile."):
                path = PACKAGE.joinpath(*module.split(".")[1:])
                files |= {each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()}
    return files


def reached(file: Path) -> set[Path]:
    """The file and all that it imports, directly or not."""
    seen, stack = {file}, [file]
    while stack:
        new = imported(stack.pop()) - seen
        seen |= new
        stack += new
    return seen


def test_every_file_that_the_rewrites_and_operators_import_is_in_the_key():
    files = reached(PACKAGE / "inductor" / "backend.py") | reached(PACKAGE / "tensor" / "weight.py")
    assert PACKAGE / "kernels" / "dispatch.py" in files
    hashed = set(map(Path, backend._hashed_files()))
    assert files - NO_NUMBERS <= hashed
    rooms = {path.relative_to(PACKAGE).parts[0] for path in files - NO_NUMBERS}
    data = {each for room in rooms for each in (PACKAGE / room).rglob("*") if each.is_file()}
    assert {each for each in data if each.suffix != ".pyc"} <= hashed
