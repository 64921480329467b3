"""benchmarks/results/folds.jsonl -> the table of architectures in docs/folds.md.

    python docs/folds_table.py

rewrites the table, which ends the page; a test compares it with the records.
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent
RECORDS = DOCS.parent / "benchmarks" / "results" / "folds.jsonl"
HEAD = """\
| architecture | groups | folded | multiplied | skipped | smooth-quant, dB | random factors, dB |
|---|---:|---:|---:|---:|---:|---:|"""


def folds_table() -> str:
    """The table in Markdown, one row an architecture, in the order of the records."""
    return "\n".join([HEAD, *(_row(json.loads(line)) for line in RECORDS.read_text().splitlines())])


def _row(record: dict) -> str:
    counts = [record[key] for key in ("architecture", "groups", "folded", "multiplied", "skipped")]
    return f"| {' | '.join(map(str, counts))} | {_db(record['sqnr_db_smooth'])} | {_db(record['sqnr_db_awq'])} |"


def _db(value: float | None) -> str:
    return "exact" if value is None or value == float("inf") else f"{value:.0f}"


def main() -> None:
    page = DOCS / "folds.md"
    text = page.read_text().partition(HEAD)[0]
    page.write_text(f"{text}{folds_table()}\n")


if __name__ == "__main__":
    main()
