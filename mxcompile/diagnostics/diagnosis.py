"""What a `diagnose` pass has found: how hard each value is to quantize, and the step that saves most, with its number.

A layer has *outlier channels* if a channel of its input is out of proportion to its column of the weights by more than
`OUTLIERS` (`SampledValue.imbalance`): 500 is a channel 22 times as large as others, with weights a 22nd of theirs. The
recommended step is the one that saves most, if it saves at least 1 dB; a rotation costs run time, so it must save 1 dB
more than a fold. Where the SQNR then stays one bit (6 dB) below that of the median value, the layer should keep 8 bits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxcompile.diagnostics.tables import graded, table
from mxcompile.graph.records import PassRecord

PASS = "diagnose"
OUTLIERS = 500.0  # layers of SmolLM2-135M reach 376, with planted outliers at least 828 (benchmarks/diagnosis.py)
_WORTH, _ONE_BIT = 1.0, 6.02  # dB
_GOOD_DB, _BAD_DB = 25.0, 15.0
_OUTPUT = "output_"
_LISTED = 12


@dataclass(frozen=True)
class Advice:
    """A step: `fold`, `permute`, `rotate` or `bits`. reason: the number that speaks for it. saves_db: of the layer's
    error."""

    step: str
    reason: str
    saves_db: float

    def __str__(self) -> str:
        name = "keep 8 bits" if self.step == "bits" else self.step
        return f"{name}: {self.reason}, saves {self.saves_db:.1f} dB"


@dataclass(frozen=True)
class ValueDiagnosis:
    """A value and the layers that read it.

    numbers: as the ledger has them for each of its layers, without those of their outputs. outputs: likewise, those of
    each layer's output, by layer. advice: the recommended step, None if nothing is worth it.
    """

    layers: tuple[str, ...]
    numbers: Mapping[str, float]
    outputs: Mapping[str, Mapping[str, float]]
    advice: Advice | None

    @property
    def has_outliers(self) -> bool:
        """Whether it has outlier channels."""
        return self.numbers["imbalance"] > OUTLIERS

    @property
    def name(self) -> str:
        """Its layers in a table: `model.layers.0.self_attn.q_proj, k_proj, v_proj`."""
        first, *others = (layer.removesuffix(".weight") for layer in self.layers)
        parent = first.rpartition(".")[0]
        return ", ".join([first, *(other.removeprefix(f"{parent}.") for other in others)])

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        advice = self.advice and vars(self.advice) | {"text": str(self.advice)}
        return {
            "layers": list(self.layers),
            "outliers": self.has_outliers,
            "advice": advice,
            "numbers": dict(self.numbers),
            "outputs": {layer: dict(numbers) for layer, numbers in self.outputs.items()},
        }


@dataclass(frozen=True)
class Diagnosis:
    """The values of a model in graph order. spec: the pass that measured them, in a pipeline's text form."""

    spec: str
    values: tuple[ValueDiagnosis, ...]

    @classmethod
    def of(cls, records: Iterable[PassRecord]) -> Self | None:
        """From the last `diagnose` of a ledger, None if there is none."""
        found = [record for record in records if record.name == PASS]
        return cls(found[-1].spec, tuple(_values(found[-1].numbers))) if found else None

    @property
    def outliers(self) -> tuple[str, ...]:
        """The layers with outlier channels."""
        return tuple(layer for value in self.values if value.has_outliers for layer in value.layers)

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "pass": self.spec,
            "outliers": list(self.outliers),
            "values": [value.record() for value in self.values],
        }

    def to_table(self, count: int | None = None) -> Table:
        """A row for every value, or for so many with the lowest SQNR, the worst first."""
        values = self.values if count is None else sorted(self.values, key=lambda value: value.numbers["sqnr_db"])
        rows = [_row(value) for value in values[:count]]
        numbers = ("channel\nratio", "kurtosis", "top 1 %", "in block", "first\ntoken", "imbalance", "SQNR")
        title = f"inputs of layers{'' if count is None else ', the worst first'}: SQNR of the output in dB"
        return table(("read by", "recommended"), numbers, rows, title)

    def print_to(self, console: Console, every: bool = False) -> None:
        """Print the table, of the worst values or of every one, and what is recommended how often."""
        console.print(self.to_table(None if every else _LISTED))
        for line in self.conclusions():
            console.print(line, markup=False)

    def conclusions(self) -> list[str]:
        """How many layers have outlier channels, and how often each step is recommended."""
        layers = sum(len(value.layers) for value in self.values)
        lines = [f"outlier channels in the inputs of {len(self.outliers)} of {layers} layers"]
        for step, words in _STEPS.items():
            advised = [value.advice for value in self.values if value.advice and value.advice.step == step]
            if advised:
                saved = median(advice.saves_db for advice in advised)
                values = f"{len(advised)} of {len(self.values)} values"
                lines.append(f"{words} for {values}, which saves {saved:.1f} dB (median)")
        return lines


_STEPS = {
    "fold": "fold (awq-fold; a linear's output needs through_linears=true)",
    "permute": "sort channels (permute)",
    "rotate": "rotate (rotate)",
    "bits": "keep 8 bits (overrides)",
}


def _values(numbers: Mapping[str, Mapping[str, float]]) -> Iterable[ValueDiagnosis]:
    """Neighboring layers with the same numbers read the same value."""
    groups: list[tuple[list[str], dict[str, float]]] = []
    for layer, each in numbers.items():
        own = {key: number for key, number in each.items() if not key.startswith(_OUTPUT)}
        if groups and groups[-1][1] == own:
            groups[-1][0].append(layer)
        else:
            groups.append(([layer], own))
    typical = median(own["sqnr_db"] for _, own in groups) if groups else 0.0
    for layers, own in groups:
        outputs = {
            layer: {k.removeprefix(_OUTPUT): n for k, n in numbers[layer].items() if k.startswith(_OUTPUT)}
            for layer in layers
        }
        yield ValueDiagnosis(tuple(layers), own, outputs, advise(own, typical))


def advise(numbers: Mapping[str, float], typical_db: float) -> Advice | None:
    """The step that is worth most for a value. typical_db: the SQNR of the model's median value."""
    fold, order, rotation = (numbers.get(key, 0.0) for key in ("fold_db", "permute_db", "rotate_db"))
    free = max(fold, order)
    best: Advice | None = None
    if free >= _WORTH and free >= rotation - _WORTH:
        if fold >= _WORTH and fold >= order - _WORTH:
            best = Advice("fold", f"imbalance {three_digits(numbers['imbalance'])}", fold)
        else:
            best = Advice("permute", f"in-block ratio {three_digits(numbers['input_in_block'])}", order)
    elif rotation >= _WORTH:
        best = Advice("rotate", f"in-block ratio {three_digits(numbers['input_in_block'])}", rotation)
    reached = numbers["sqnr_db"] + (best.saves_db if best else 0.0)
    if reached < typical_db - _ONE_BIT and numbers["bits_db"] >= _WORTH:
        return Advice("bits", f"SQNR {reached:.1f} dB at best, {typical_db:.1f} in the median", numbers["bits_db"])
    return best


def three_digits(value: float) -> str:
    """A number with three digits, without an exponent where it is large."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _row(value: ValueDiagnosis) -> list[str | Text]:
    numbers = value.numbers
    name = Text(value.name, style="red" if value.has_outliers else "")
    first = numbers["input_first_token"]
    return [
        name,
        str(value.advice or ""),
        three_digits(numbers["input_channel_ratio"]),
        three_digits(numbers["input_channel_kurtosis"]),
        f"{numbers['input_top_share']:.0%}",
        f"{numbers['input_in_block']:.1f}",
        three_digits(first) if first else "",
        three_digits(numbers["imbalance"]),
        graded(f"{numbers['sqnr_db']:.1f}", numbers["sqnr_db"], _GOOD_DB, _BAD_DB),
    ]
