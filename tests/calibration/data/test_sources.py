"""Documents of files and data sets: what a row is, how a source is written, and what is said of one that is no good."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mxcompile.calibration.data.chats import chat_text
from mxcompile.calibration.data.sources import Documents, SourceName, documents_of, read_documents
from mxcompile.errors import InputError

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def documents(source: str) -> list[Any]:
    return list(read_documents(SourceName.parse(source)).items)


# How a source is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4.jsonl", ("c4.jsonl", None, None)),
        ("c4.jsonl:128", ("c4.jsonl", None, 128)),
        ("owner/name:train:64", ("owner/name", "train", 64)),
        ("owner/name/config:test", ("owner/name/config", "test", None)),
        ("a:b.txt", ("a:b.txt", None, None)),
        ("a:b.txt:7", ("a:b.txt", None, 7)),
    ],
)
def test_a_source_with_a_split_and_a_number(text, expected):
    """A file that exists keeps its colons."""
    Path("a:b.txt").write_text("The")
    source = SourceName.parse(text)
    assert (source.name, source.split, source.windows) == expected


@pytest.mark.parametrize("text", ["", ":train", "c4.jsonl:0", "c4.jsonl::3", "c4.jsonl:train:"])
def test_no_source(text):
    with pytest.raises(InputError, match=r"is no calibration source: write FILE_OR_NAME\[:split\]\[:windows\]"):
        SourceName.parse(text)


# Rows


def test_rows_of_every_kind():
    """The first column that a row has; null is none. Token ids with a text keep both."""
    rows = [
        {"text": "The", "url": "x"},
        {"messages": CHAT, "text": "not this"},
        {"conversations": [{"from": "human", "value": "Hello"}], "messages": None},
        {"prompt": "Paris"},
        {"prompt": CHAT},
        {"input_ids": [3, 4]},
        {"text": "The is", "input_ids": [2, 6]},
    ]
    found = documents(written("rows.jsonl", *rows))
    assert found == ["The", CHAT, rows[2]["conversations"], "Paris", CHAT, [3, 4], "The is"]
    assert found[-1].ids == [2, 6]


def test_a_text_file_is_one_document():
    Path("words.txt").write_text("The capital\n\nof France")
    assert documents("words.txt") == ["The capital\n\nof France"]
    assert read_documents(SourceName.parse("words.txt")).label == "words.txt"


def test_documents_from_python():
    ids = torch.arange(4)
    given = ["The", CHAT, [1, 2], ids, {"text": "is"}]
    assert list(documents_of(iter(given), "mine").items) == ["The", CHAT, [1, 2], ids, "is"]
    with pytest.raises(InputError, match=r"mine, document 1: a document is a text, .* not a float"):
        documents_of([1.5], "mine")
    with pytest.raises(InputError, match=r"mine, document 1: .*, not float32 \[3\]"):
        documents_of([torch.ones(3)], "mine")
    with pytest.raises(InputError, match="mine is empty"):
        documents_of([], "mine")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty: there is nothing to calibrate on"),
        ("empty.jsonl", b"\n\n", "empty.jsonl is empty"),
        ("latin.txt", "Caf\u00e9".encode("latin-1"), "latin.txt cannot be read as text: 'utf-8' codec can't decode"),
        ("latin.jsonl", '{"text": "\u00e9"}'.encode("latin-1"), "latin.jsonl cannot be read as text: 'utf-8' codec"),
        ("other.jsonl", b'{"words": "The", "id": 3}', "line 1 has no column .*text or prompt: it has words, id"),
        ("broken.jsonl", b'{"text": "The"', "broken.jsonl, line 1: not a JSON object"),
        ("list.jsonl", b"[1, 2]", 'list.jsonl, line 1: not a JSON object with a "text" or "messages"'),
        ("number.jsonl", b'{"text": 3}', "line 1, text: a document is a text, .*, not a int"),
        ("table.csv", b"text\nThe", "table.csv: calibration reads .txt, .jsonl and .parquet files, not .csv"),
        ("c4.jsonl.gz", b"", "reads .txt, .jsonl and .parquet files, not .gz"),
        ("words.txt:train", b"", "words.txt is one file, which has no splits: leave out :train"),
        ("missing.jsonl:3", None, "missing.jsonl cannot be read: there is no such file or folder"),
        ("./missing", None, "./missing cannot be read: there is no such file or folder"),
    ],
)
def test_a_file_that_is_no_good(name, content, message):
    if content is not None:
        Path(name.partition(":")[0]).write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents(name)


# Chats


class Templated:
    """A tokenizer with a chat template, which wants a user to begin."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        if messages[0]["role"] != "user":
            raise ValueError("a user begins")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_chats_of_both_forms():
    theirs = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    assert chat_text(CHAT, Templated(), "") == chat_text(theirs, Templated(), "") == "<user>Hello<assistant>Hi"


def test_chats_that_cannot_be_written():
    with pytest.raises(InputError, match=r"chats.jsonl, document 2 is a chat, and the tokenizer has no chat template"):
        chat_text(CHAT, SimpleNamespace(chat_template=None), "chats.jsonl, document 2")
    with pytest.raises(InputError, match="document 2: the tokenizer's chat template refuses the chat: a user begins"):
        chat_text(CHAT[1:], Templated(), "document 2")


# Libraries that are not installed with mxcompile


@pytest.mark.parametrize(
    ("source", "package"), [("rows.parquet", "pyarrow"), ("owner/name", "datasets"), (".", "datasets")]
)
def test_a_library_that_is_missing(monkeypatch, source, package):
    Path("rows.parquet").write_bytes(b"")
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {package}, which is not installed: pip install {package}"):
        documents(source)


@pytest.fixture
def hub(monkeypatch) -> dict[str, Any]:
    """What a stand-in for `datasets` loads, by name and config; it has the errors of the real one."""
    loaded: dict[Any, Any] = {}

    class DatasetsError(Exception):
        pass

    def load_dataset(name: str, config: str | None = None, *, streaming: bool) -> Any:
        assert streaming
        if (name, config) not in loaded:
            raise DatasetsError(f"Dataset '{name}' doesn't exist on the Hub\nor cannot be accessed")
        return loaded[name, config]

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return loaded


def test_a_split_of_a_data_set(hub):
    hub["owner/name", None] = {"train": [{"text": "The"}], "test": [{"text": "is"}]}
    hub["owner/one", "english"] = {"validation": [{"messages": CHAT}]}
    hub["plain", None] = [{"text": "Paris"}]
    assert documents("owner/name") == documents("owner/name:train:5") == ["The"]
    assert documents("owner/name:test") == ["is"]
    assert documents("owner/one/english") == [CHAT]
    assert documents("plain") == ["Paris"]


def test_a_data_set_that_is_no_good(hub):
    def broken() -> Iterator[Any]:
        yield {"text": "The"}
        raise OSError("the connection was lost")

    hub["owner/name", None] = {"dev": [{"words": "The"}], "test": []}
    hub["owner/lost", None] = broken()
    for source, message in {
        "owner/name": r"owner/name has several splits: it has dev, test \(NAME:split chooses one\)",
        "owner/name:train": "owner/name has no split 'train': it has dev, test",
        "owner/name:dev": "owner/name:dev, document 1 has no column .*: it has words",
        "owner/name:test": "owner/name:test is empty",
        "owner/lost:train": "owner/lost has no splits: leave out :train",
        "owner/other": "the data set owner/other cannot be read: Dataset .* doesn't exist .*; there is no file",
    }.items():
        with pytest.raises(InputError, match=message):
            documents(source)
    with pytest.raises(InputError, match="the data set owner/lost cannot be read: the connection was lost"):
        documents("owner/lost")


def test_parquet_files():
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"id": 1, "text": "The"}, {"id": 2, "text": "is"}]), "texts.parquet")
    parquet.write_table(Table.from_pylist([{"messages": CHAT}]), "chats.parquet")
    parquet.write_table(Table.from_pylist([{"id": 1, "words": "The"}]), "other.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    assert documents("texts.parquet:9") == ["The", "is"]
    assert documents("chats.parquet") == [CHAT]
    with pytest.raises(InputError, match=r"other.parquet, document 1 has no column .*: it has id, words"):
        documents("other.parquet")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read as parquet: "):
        documents("broken.parquet")


@pytest.mark.slow
def test_folders_by_the_real_library(monkeypatch):
    """What `save_to_disk` wrote, and a folder of files."""
    datasets: Any = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "cache")
    texts = datasets.Dataset.from_list([{"text": "The"}, {"text": "is"}])
    texts.save_to_disk("one")
    datasets.DatasetDict({"train": texts, "test": texts.select([1])}).save_to_disk("two")
    Path("files").mkdir()
    written("files/train.jsonl", {"text": "Paris"})
    written("files/test.jsonl", {"text": "Berlin"})
    assert documents("one") == documents("two:train") == ["The", "is"]
    assert documents("two:test:4") == ["is"]
    assert documents("files") == ["Paris"]
    assert documents("files:test") == ["Berlin"]
    assert list(documents_of(texts, "mine").items) == ["The", "is"]
    with pytest.raises(InputError, match="files has no split 'dev': it has train, test"):
        documents("files:dev")
    Path("nothing").mkdir()
    with pytest.raises(InputError, match="the data set nothing cannot be read: "):
        documents("nothing")
    assert isinstance(documents_of(["x"], "y"), Documents)
