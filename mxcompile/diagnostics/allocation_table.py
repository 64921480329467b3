"""The table of the formats that a pass has chosen under a budget: what each would have cost."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from mxcompile.diagnostics.tables import table
from mxcompile.graph.records import Allocation, ItemFormat


def item_name(item: ItemFormat) -> str:
    """The weights of an item in one line: `model.layers.0.self_attn: q_proj, k_proj, v_proj`."""
    paths = [name.removesuffix(".weight") for name in item.weights]
    owners = {path.rpartition(".")[0] for path in paths}
    if len(paths) == 1 or len(owners) > 1:
        return ", ".join(paths)
    return f"{owners.pop()}: {', '.join(path.rpartition('.')[2] for path in paths)}"


def allocation_table(allocation: Allocation) -> Table:
    """A row for every item, with the cost of each format in thousandths of a nat."""
    formats = tuple(dict.fromkeys(name for item in allocation.items for name in item.costs))
    rows = [
        (
            item_name(item),
            f"{item.format or 'float'}{' (fixed)' if item.fixed else ''}",
            item.activation or "float",
            f"{item.bytes / 1e3:.0f}",
            *("" if name not in item.costs else f"{item.costs[name] * 1e3:.3g}" for name in formats),
        )
        for item in allocation.items
    ]
    title = f"formats chosen for {allocation.limit}: KL in thousandths of a nat that each would add"
    return table(("weights", "chosen", "input"), ("kB", *formats), rows, title)


def print_allocation(console: Console, allocation: Allocation) -> None:
    """Print the table, and what the choice costs altogether."""
    console.print(allocation_table(allocation))
    for line in allocation_lines(allocation):
        console.print(line, markup=False)


def allocation_lines(allocation: Allocation) -> tuple[str, str]:
    """The choice in two sentences."""
    counts = Counter({name: 0 for item in allocation.items for name in item.costs})
    counts.update(item.format or "float" for item in allocation.items for _ in item.weights)
    formats = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    time = "" if allocation.microseconds is None else f", {allocation.microseconds:.0f} us of matmuls"
    chosen = (
        f"{allocation.bits:.4g} bits a weight with scales{time} ({formats}); costs by {allocation.score}, chosen by "
        f"{allocation.solver}"
    )
    price = (
        f"{allocation.price:.2g} less with one more {allocation.unit}"
        if allocation.price
        else "the budget is not the limit"
    )
    return chosen, f"expected KL of rounding {allocation.rounding} {allocation.kl:.4f}; {price}"
