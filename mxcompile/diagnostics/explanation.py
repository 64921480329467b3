"""The result of `explain`: the kernel selected for each group of similar layers, and why it was not a better one."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from mxcompile.diagnostics.tables import table

FLOAT, LOOKUP, UNFUSED = "torch", "lookup", "unfused"
CPU, CPU_DECODED, PLANES, TRITON, REFERENCE = "cpu", "decoded", "planes", "triton_linear", "reference"
FP8: Final = "fp8"
EXPERTS, CPU_EXPERTS, EACH_EXPERT = "experts", "cpu_experts", "each_expert"
MEANINGS: Final = {
    FLOAT: "float weight, multiplied by torch",
    LOOKUP: "embedding lookup, decodes only the rows that it reads",
    CPU: "C++ kernel, multiplies packed weights without decoding them to memory",
    CPU_DECODED: "C++ kernel decodes the weight into a buffer, torch multiplies",
    PLANES: "fused GPU kernel; compiling converts the weight to the planar layout",
    FP8: "as planes, and for 512 tokens or more an FP8 (e4m3) matmul",
    EXPERTS: "fused GPU kernels of the chosen experts; compiling converts the weight to the planar layout",
    CPU_EXPERTS: "C++ kernel of the chosen experts, packed where an expert has few tokens",
    EACH_EXPERT: "each chosen expert on its own, as a matrix",
    TRITON: "Triton kernel, decodes packed weights inside the matmul",
    REFERENCE: "no kernel; every call decodes the whole weight in plain PyTorch, then multiplies",
    UNFUSED: "no fused kernel; every call decodes the whole weight, then torch multiplies",
}
_WIDTH: Final = 160  # columns of a table as text


@dataclass(frozen=True)
class SelectedKernel:
    """The kernels that run a group of similar layers.

    pattern: the layers' name, with * for numbers. count: number of layers. shape: of one weight.
    weight, activation: formats, None for float; the activation may be "mxfp8_e4m3 aligned".
    decode, prefill: the kernel for 1 token and for many, a key of `MEANINGS`.
    reasons: why no better kernel runs them, or why they stay float.
    bytes_before, bytes_after: of all layers together; 0 if the weight is counted elsewhere.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    weight: str | None
    activation: str | None
    decode: str
    prefill: str
    reasons: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Explanation:
    """The kernels that run a model's layers on a device, and the model's size.

    device: where the model would run. recipe: None for a model that is already quantized. layers: in model order.

    bytes_before, bytes_after: of the whole model. uncompiled: why `torch.compile` cannot target the device, or None.
    vllm: what vLLM cannot do with the model, or does otherwise. generate: which loop decodes in `generate`.
    """

    device: str
    recipe: str | None
    layers: tuple[SelectedKernel, ...]
    bytes_before: int
    bytes_after: int
    uncompiled: str | None
    vllm: tuple[str, ...] = ()
    generate: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[SelectedKernel, ...]:
        """The layers with MX weights."""
        return tuple(layer for layer in self.layers if layer.weight is not None)

    @property
    def left_float(self) -> tuple[SelectedKernel, ...]:
        """The layers that stay float."""
        return tuple(layer for layer in self.layers if layer.weight is None)

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        layers = [vars(layer) | {"shape": list(layer.shape), "reasons": list(layer.reasons)} for layer in self.layers]
        return vars(self) | {"layers": layers, "conclusions": list(self.conclusions())}

    def to_table(self) -> Table:
        """One row for each group of similar layers."""
        same = all(layer.decode == layer.prefill for layer in self.layers)
        rows: list[list[str]] = []
        heading = ""
        for layer in self.layers:
            prefix, star, name = layer.pattern.rpartition("*.")
            if star and prefix != heading:
                rows.append([f"{prefix}*", *[""] * (6 if same else 7)])
            heading = prefix
            kernels = (layer.decode,) if same else (layer.decode, layer.prefill)
            sizes = (f"{layer.bytes_before / 1e6:.2f}", f"{layer.bytes_after / 1e6:.2f}" if layer.weight else "")
            formats = (layer.weight or "float", layer.activation or "")
            rows.append([f"{'  ' * bool(star)}{name}", *formats, *kernels, str(layer.count), *sizes])
        names = ("layer", "weight", "input", *(("kernel",) if same else ("1 token", "many tokens")))
        return table(names, ("layers", "MB", "as MX"), rows)

    def print_to(self, console: Console) -> None:
        """Print the table, what each kernel does, the reasons against better ones, and the conclusions."""
        console.print(f"on {self.device}" + (f", recipe {self.recipe}" if self.recipe else ""), markup=False)
        console.print(self.to_table())
        for word in dict.fromkeys(kernel for layer in self.layers for kernel in (layer.decode, layer.prefill)):
            console.print(f"{word}: {MEANINGS.get(word, word)}", markup=False)
        for line in (*self._reasons(), *self.conclusions()):
            console.print(line, markup=False)

    def __str__(self) -> str:
        """What `print_to` prints, without colors."""
        console = Console(width=_WIDTH, highlight=False, color_system=None)
        with console.capture() as capture:
            self.print_to(console)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def conclusions(self) -> Iterator[str]:
        """The model's size, how many weights are decoded on every call, and what stays float."""
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        yield f"whole model: {before:.1f} -> {after:.1f} MB ({share:.0%})"
        if not self.quantized:
            yield "nothing is quantized"
            return
        if self.uncompiled is not None:
            yield f"{self.uncompiled}: the model runs uncompiled, nothing is fused"
        unfused = [layer for layer in self.quantized if layer.decode in (UNFUSED, REFERENCE)]
        if unfused:
            layers = sum(layer.count for layer in unfused)
            yield f"{layers} of {sum(layer.count for layer in self.quantized)} MX weights are decoded on every call"
        if uncovered := self._not_covered():
            yield uncovered
        yield from (*self.generate, *self.vllm)

    def _reasons(self) -> Iterator[str]:
        layers_of: dict[str, list[str]] = {}
        for layer in self.layers:
            for reason in layer.reasons:
                layers_of.setdefault(reason, []).append(layer.pattern)
        for reason, patterns in layers_of.items():
            everywhere = len(patterns) == len(self.quantized) > 1
            listed = "all MX weights" if everywhere else ", ".join(patterns)
            yield f"- {listed}: {reason}"

    def _not_covered(self) -> str | None:
        """The float share of the matmul weight bytes that every token reads."""
        stays = sum(layer.bytes_before for layer in self.left_float)
        total = stays + sum(layer.bytes_after for layer in self.quantized)
        if not stays or not total:
            return None
        return f"{stays / total:.0%} of the matmul weight bytes that every token reads stay float"


def group_similar(layers: Iterable[SelectedKernel]) -> tuple[SelectedKernel, ...]:
    """Merge layers that differ only in the numbers of their names; a group stands where its first layer stood."""
    groups: dict[SelectedKernel, SelectedKernel] = {}
    for layer in layers:
        reasons = tuple(map(_starred, layer.reasons))
        plain = replace(layer, pattern=_starred(layer.pattern), reasons=reasons)
        key = replace(plain, bytes_before=0, bytes_after=0)
        group = groups.get(key, replace(key, count=0))
        groups[key] = replace(
            plain,
            count=group.count + layer.count,
            bytes_before=group.bytes_before + layer.bytes_before,
            bytes_after=group.bytes_after + layer.bytes_after,
        )
    return tuple(groups.values())


def _starred(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", text)
