"""benchmarks/results/zoo.jsonl -> the tables of docs/architectures.md, one a kind of architecture.

    python docs/architectures_table.py

rewrites the tables, which end the page; a test compares them with the records.
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent
RECORDS = DOCS.parent / "benchmarks" / "results" / "zoo.jsonl"
BEGIN = "## Results\n"
HEAD = """\
| architecture | trace, s | quantized | 8 bits, dB | 4 bits, rounded | 4 bits, learned | saved | generates | why not |
|---|---:|---:|---:|---:|---:|---|---|---|"""


def tables() -> str:
    """A heading and a table in Markdown for each kind, in the order of the records; a row an architecture."""
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    kinds = dict.fromkeys(record["kind"] for record in records)
    return "\n".join(_table(kind, [record for record in records if record["kind"] == kind]) for kind in kinds)


def _table(kind: str, records: list[dict]) -> str:
    return "\n".join([f"\n### {kind[0].upper()}{kind[1:]}\n", HEAD, *map(_row, records)])


def _row(record: dict) -> str:
    decibels = [_number(record[key]) for key in ("w8a8_db", "w4a8_quick_db", "w4a8_db")]
    cells = [
        *(record["architecture"], _number(record["seconds"]), _share(record["quantized"]), *decibels),
        *(_word(record["saved"]), _generates(record), _reasons(record)),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else "exact" if value == float("inf") else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("%", " %")


def _word(value: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[value]


def _generates(record: dict) -> str:
    return _word(record["generated"])


def _reasons(record: dict) -> str:
    """Why stages failed, else why matmuls stay in float."""
    failures = [f"{stage.replace('_', ' ')}: {reason}" for stage, reason in record["reasons"].items()]
    return "; ".join([*failures, *(record["misses"] or ())[:1]]).replace("|", "\\|")


def main() -> None:
    page = DOCS / "architectures.md"
    text = page.read_text().partition(BEGIN)[0]
    page.write_text(f"{text}{BEGIN}{tables()}\n")


if __name__ == "__main__":
    main()
