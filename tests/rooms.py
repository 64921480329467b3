"""The rooms of the house, from the ground up, and the arrows between them: who imports whom.

    python tests/rooms.py

prints each room with its files and lines, and the rooms that it imports. A file's room is its first folder, or itself
where it lies in `mxcompile/`; imports inside functions count.
"""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = [*sorted((ROOT / "mxcompile").rglob("*.py")), *sorted((ROOT / "passes").glob("*.py"))]
FLOORS = (
    {"errors"},
    {"arguments"},
    {"formats", "atomic_files"},
    {"numerics"},
    {"kernels"},
    {"ops"},
    {"tensor"},
    {"graph", "checkpoint"},
    {"analysis", "inductor"},
    {"calibration", "deploy", "export", "serving"},
    {"pipeline"},
    {"passes"},
    {"diagnostics", "model_free", "training"},
    {"api"},
    {"cli"},
    {"__init__"},
    {"__main__"},
)
EXCEPTIONS = {("mxcompile/pipeline/pipeline.py", "passes")}  # Pipeline.parse reads the table of built-in passes


def room(path: Path) -> str:
    """The room that a file lies in."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "passes" if parts[0] == "passes" else parts[1]


@cache
def arrows(path: Path, whole: bool = False) -> set[str]:
    """Rooms of mxcompile that a file imports anywhere in it; whole: modules, and names that may be modules."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in modules if name.startswith("mxcompile.")}
    rooms = {name.split(".")[1] for name in ours} & {room for floor in FLOORS for room in floor}
    return ours if whole else rooms


def main() -> None:
    """Print the rooms from the top down, then how many arrows there are."""
    files, lines = Counter(map(room, PRODUCT)), Counter[str]()
    targets: dict[str, set[str]] = {}
    for path in PRODUCT:
        lines[room(path)] += path.read_text().count("\n")
        targets.setdefault(room(path), set()).update(arrows(path) - {room(path)})
    for floor, names in reversed(list(enumerate(FLOORS, start=1))):
        for name in sorted(names):
            below = ", ".join(sorted(targets[name])) or "nothing"
            print(f"{floor:3} {name:12} {files[name]:3} files {lines[name]:5} lines  imports {below}")
    print(f"{sum(map(len, targets.values()))} arrows between {len(targets)} rooms")


if __name__ == "__main__":
    main()
