"""choices.py: its grid is one of valid pipelines, and groups come in the order of their worth, seed after seed."""

from pathlib import Path

import choices

FILE = Path(choices.__file__).with_suffix(".toml")


def test_every_pipeline_of_the_file_is_valid():
    groups = choices.read_groups(FILE)
    assert len(groups) > 40
    for group in groups:
        for text in group.pipelines.values():
            pipeline = group.filled(f"{group.first} | {text}" if group.first else text, lower=True)
            assert str(pipeline.passes[-1]).startswith(f"lower-mx{{weight={group.weight}")
    assert len({group.name for group in groups}) == len(groups)


def test_first_seeds_come_first():
    groups = choices.read_groups(FILE)
    first = {group.number: group.seed for group in reversed(groups)}
    assert all(group.seed >= first[group.number] for group in groups)
    assert groups[0].number == 0


def test_records_of_a_cut_run_are_read(tmp_path):
    file = tmp_path / "records.jsonl"
    assert choices.read_records(file) == []
    file.write_text('{"key": ["0-0", "recipe"]}\n{"key": ["0-')
    assert choices.read_records(file) == [{"key": ["0-0", "recipe"]}]
