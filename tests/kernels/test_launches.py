"""A kernel is launched through Triton once for each kind of arguments, then itself."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
KERNELS = Path(__file__).parents[2] / "mxcompile" / "kernels"
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "launch_pdl"}
Launch = tuple[str, tuple[int, ...], tuple[Any, ...]]


class Kernel:
    """Records launches through Triton, and of what it returns as the compiled kernel."""

    arg_names = ("x", "y", "size", "A", "B")

    def __init__(self, *, interpreted: bool = False) -> None:
        self.launches: list[Launch] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.launches.append(("triton", grid, (*arguments, *constants.items())))
            return None if self.interpreted else Compiled(self.launches)

        return run


class Compiled:
    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append(("compiled", grid, arguments))


def test_the_second_launch_is_of_the_compiled_kernel() -> None:
    from mxcompile.kernels.triton.launches import launch

    kernel, x, y = Kernel(), torch.zeros(8), torch.ones(8)
    launch(kernel, 3, x, (x, None), 8, B=5, A=4, num_warps=2)
    launch(kernel, (3, 2), y, (y, None), 8, B=5, A=4, num_warps=2)
    (first, _, passed), (second, grid, arguments) = kernel.launches
    assert (first, second, grid) == ("triton", "compiled", (3, 2, 1))
    assert passed[-3:] == (("B", 5), ("A", 4), ("num_warps", 2))
    assert arguments[0] is y
    assert arguments[1][0] is y
    assert arguments[2:] == (8, 4, 5), "constexpr arguments in the kernel's order, no compiler options"


def _descriptor(block: list[int], layout: str, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(base=torch.zeros(32, dtype=dtype), block_shape=block, layout=layout)


ALIGNED = torch.zeros(32, dtype=torch.bfloat16)
USUAL: dict[str, Any] = {"x": _descriptor([4, 8], "swizzled"), "y": (ALIGNED, ALIGNED), "size": 16, "A": 1, "B": True}


@pytest.mark.parametrize(
    "other",
    [
        {"x": ALIGNED},
        {"x": _descriptor([8, 4], "swizzled")},
        {"x": _descriptor([4, 8], "plain")},
        {"x": _descriptor([4, 8], "swizzled", torch.float16)},
        {"y": (ALIGNED, ALIGNED[1:])},
        {"y": (ALIGNED.half(), ALIGNED)},
        {"y": (ALIGNED, ALIGNED, ALIGNED)},
        {"y": (ALIGNED, None)},
        {"y": ALIGNED},
        {"size": 17},
        {"A": 2},
        {"B": False},
        {"num_warps": 8},
    ],
)
def test_other_kinds_of_arguments_go_through_triton(other: dict[str, Any]) -> None:
    from mxcompile.kernels.triton.launches import launch

    kernel = Kernel()
    for case in (USUAL, USUAL | other, USUAL, USUAL | other):
        constants = {name: value for name, value in case.items() if name not in ("x", "y", "size")}
        launch(kernel, 1, case["x"], case["y"], case["size"], **constants)
    assert [how for how, _, _ in kernel.launches] == ["triton", "triton", "compiled", "compiled"]


def test_another_kernel_goes_through_triton() -> None:
    from mxcompile.kernels.triton.launches import launch

    kernels = [Kernel(), Kernel()]
    for kernel in kernels:
        launch(kernel, 1, ALIGNED, ALIGNED, 1, A=1, B=1)
    assert [len(kernel.launches) for kernel in kernels] == [1, 1]
    assert all(kernel.launches[0][0] == "triton" for kernel in kernels)


def test_an_interpreted_kernel_always_goes_through_triton() -> None:
    from mxcompile.kernels.triton.launches import launch

    kernel = Kernel(interpreted=True)
    for _ in range(2):
        launch(kernel, 1, ALIGNED, ALIGNED, 1, A=1, B=1)
    assert [how for how, _, _ in kernel.launches] == ["triton", "triton"]


def test_the_number_of_kernels_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxcompile.kernels.triton import launches

    monkeypatch.setattr(launches, "_MOST_KERNELS", 4)
    monkeypatch.setattr(launches, "_compiled", {})
    kernel = Kernel()
    for size in range(10):
        launches.launch(kernel, 1, ALIGNED, ALIGNED, size, A=1, B=1)
        assert len(launches._compiled) <= 4


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_only_constants_are_passed_by_keyword(path: Path) -> None:
    """A tensor passed so would be that of the first launch in all others."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    launches = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "launch"]
    names = {keyword.arg for call in launches for keyword in call.keywords if keyword.arg is not None}
    assert {name for name in names if not name.isupper()} <= OPTIONS
