"""Calibration batches: windows of the documents' tokens, in the order of the text, each length with its share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mxcompile
from mxcompile.calibration.data.batches import windows_in_words
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli.model_source import load_model
from mxcompile.errors import ArgumentError, InputError

WORDS = ["The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]
CHAT = [{"role": "user", "content": "capital of France"}, {"role": "assistant", "content": "Paris"}]
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(local_model) -> Any:
    return load_model(str(local_model))[1]


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def ids_of(batches: list[mxcompile.WeightedBatch]) -> list[Tensor]:
    return [batch["input_ids"] for batch in batches]


def test_windows_of_a_text(tokenizer, tmp_path):
    """By default 32 windows of 512 in batches of 4; fewer if there are fewer, and never more than are asked for."""
    (tmp_path / "words.txt").write_text(text := words(2400))
    batches = mxcompile.calibration_batches(str(tmp_path / "words.txt"), tokenizer)
    assert [tuple(ids.shape) for ids in ids_of(batches)] == [(4, 512)]
    assert torch.equal(torch.cat(ids_of(batches)).flatten(), token_ids(tokenizer, text)[:2048])
    assert [batch.weight for batch in batches] == [1.0]
    few = mxcompile.calibration_batches(tmp_path / "words.txt", tokenizer, length=32, windows=66)
    assert [len(ids) for ids in ids_of(few)] == [64, 2]
    assert len(mxcompile.calibration_batches([words(40_000)], tokenizer, length=64)) == 1
    assert windows_in_words(mxcompile.calibration_batches([words(40_000)], tokenizer)) == "32 windows of 512"


def test_the_number_is_part_of_the_name(tokenizer, tmp_path):
    (tmp_path / "words.txt").write_text(words(2400))
    source = f"{tmp_path / 'words.txt'}:3"
    (batch,) = mxcompile.calibration_batches(source, tokenizer, length=100)
    assert batch["input_ids"].shape == (3, 100)
    with pytest.raises(InputError, match="says how many windows, and so does windows=4: leave out one"):
        mxcompile.calibration_batches(source, tokenizer, windows=4)


def test_documents_of_all_kinds_follow_each_other(tokenizer, tmp_path):
    """Texts with an empty line between them are split into tokens as one; chats go through the template."""
    tokenizer.chat_template = TEMPLATE
    documents = ["The capital", "of France", CHAT, [2, 3], torch.tensor([4]), "is Paris"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(dict(zip(["text", "messages", "input_ids"], row, strict=False))) + "\n"
            for row in (
                ["The capital"],
                ["of France"],
                [None, CHAT],
                [None, None, [2, 3]],
                [None, None, [4]],
                ["is Paris"],
            )
        )
    )
    chat, unknown = [0, 3, 4, 5, 0, 9], tokenizer.unk_token_id
    assert unknown == 0  # "user" and "assistant" are no words of this tokenizer
    expected = [2, 3, 4, 5, *chat, 2, 3, 4, 6, 9]
    for source in (documents, tmp_path / "rows.jsonl"):
        (batch,) = mxcompile.calibration_batches(source, tokenizer, length=len(expected), windows=1)
        assert batch["input_ids"].tolist() == [expected]


def test_token_ids_of_one_text(tokenizer):
    ids = torch.randint(12, (100,))
    (batch,) = mxcompile.calibration_batches(ids, tokenizer, length=16)
    assert torch.equal(batch["input_ids"], torch.cat(list(token_windows(ids, 16))))
    with pytest.raises(
        InputError, match=r"token ids from 0 to 99, and the tokenizer has 12 tokens: .* another tokenizer"
    ):
        mxcompile.calibration_batches(torch.arange(100), tokenizer, length=16)


def test_no_more_is_read_than_needed(tokenizer):
    """A data set may be far larger than what is taken of it."""
    read = 0

    def documents() -> Any:
        nonlocal read
        while True:
            read += 1
            yield words(50, seed=read)

    batches = mxcompile.calibration_batches(documents(), tokenizer, length=32, windows=10)
    whole = "\n\n".join(words(50, seed=seed) for seed in range(1, 20))
    assert torch.equal(torch.cat(ids_of(batches)).flatten(), token_ids(tokenizer, whole)[:320])
    assert read < 100


def test_a_long_text_is_not_split_into_tokens_as_a_whole(tokenizer):
    """Where its beginning has too few tokens, more of it is."""
    sizes: list[int] = []

    class Watched:
        def __call__(self, text: str, **options: Any) -> Any:
            sizes.append(len(text))
            return tokenizer(text, **options)

        def __len__(self) -> int:
            return len(tokenizer)

    text = words(40_000)
    batches = mxcompile.calibration_batches([text], Watched(), length=32, windows=10)
    assert torch.equal(torch.cat(ids_of(batches)).flatten(), token_ids(tokenizer, text)[:320])
    assert max(sizes) < len(text) / 20
    sizes.clear()
    spaced = " " * 20_000 + text
    late = mxcompile.calibration_batches([spaced], Watched(), length=32, windows=10)
    assert torch.equal(torch.cat(ids_of(late)), torch.cat(ids_of(batches)))
    assert 20_000 < max(sizes) < len(spaced) / 2


def test_windows_of_several_lengths(tokenizer):
    """Equal shares of tokens from all parts of the text; every window counts alike, and a token 1 on average."""
    text = words(6000)
    batches = mxcompile.calibration_batches([text], tokenizer, length=(32, 128, 512), windows=32)
    assert windows_in_words(batches) == "24 windows of 32, 6 of 128, 2 of 512"
    per_window = {round(batch.weight * batch["input_ids"].shape[1], 6) for batch in batches}
    assert len(per_window) == 1
    total = sum(batch.weight * batch["input_ids"].numel() for batch in batches)
    assert total == pytest.approx(24 * 32 + 6 * 128 + 2 * 512)
    tokens = sorted(torch.cat([ids.flatten() for ids in ids_of(batches)]).tolist())
    assert tokens == sorted(token_ids(tokenizer, text)[: 24 * 32 + 6 * 128 + 2 * 512].tolist())
    assert {len(set(ids.shape)) for ids in ids_of(batches)} <= {1, 2}


def test_long_windows_alternate_with_short_ones(tokenizer):
    """Also where batches are full: one that is held out at the end is not of one length alone."""
    batches = mxcompile.calibration_batches([words(40_000)], tokenizer, length=(256, 2048), windows=36)
    assert [ids.shape[1] for ids in ids_of(batches)] == [2048, 256] * 2 + [2048, 256] * 2


def test_lengths_like_a_tasks(tokenizer, tmp_path):
    """One window in eight of each quantile: of lines, rows, chats, or a list."""
    tokenizer.chat_template = TEMPLATE
    lines = [words(count) for count in range(10, 90)]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    expected = "2 windows of 15, 2 of 25, 2 of 35, 2 of 45, 2 of 55, 2 of 65, 2 of 75, 2 of 85"
    for like in (tmp_path / "lines.txt", str(tmp_path / "rows.jsonl"), lines):
        batches = mxcompile.calibration_batches([words(2000)], tokenizer, like=like, windows=16)
        assert windows_in_words(batches) == expected
        assert len({round(batch.weight * batch["input_ids"].shape[1], 6) for batch in batches}) == 1
    (chat,) = mxcompile.calibration_batches([words(2000)], tokenizer, like=[CHAT], windows=2)
    assert chat["input_ids"].shape == (2, 6)


def test_windows_begin_as_the_tokenizer_begins_a_text(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[EOS] $A", special_tokens=[("[EOS]", 1)])
    try:
        batches = mxcompile.calibration_batches([words(700)], tokenizer, length=(16, 64), windows=10)
        plain = mxcompile.calibration_batches([words(700)], tokenizer, length=16, special_tokens=False)
        with pytest.raises(InputError, match="windows have at least 2 tokens, of which 1 are what the tokenizer puts"):
            mxcompile.calibration_batches([words(700)], tokenizer, length=1)
    finally:
        tokenizer.backend_tokenizer.post_processor = None
    assert all((ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any() for ids in ids_of(batches))
    assert not any((ids == 1).any() for ids in ids_of(plain))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([words(30)], {}, "the calibration data has 30 tokens, fewer than a window of 512: use more text"),
        ([words(300)], {"length": 64, "windows": 9}, "has 300 tokens: 4 windows, not 9; ask for 4, or use more text"),
        ([words(90)], {"length": 64, "windows": 2}, "has 90 tokens: 1 window, not 2; ask for 1"),
        ([words(90)], {"length": (8, 128)}, "has 90 tokens, and a window of each length takes 136: use more text"),
        ([words(90)], {"windows": 0}, "windows is how many to take, from 1 to 1048576, not 0"),
        ([words(90)], {"windows": 10**30}, "windows is how many to take, from 1 to 1048576, not 10000000"),
        ([words(90)], {"length": 10**30}, "length is the tokens of a window, from 1 to 1048576, not 10000000"),
        ([words(90)], {"device": "tpu", "length": 8}, "there is no device 'tpu'"),
        ({"train": []}, {}, "the calibration data, document 1 has no column .*: it has train"),
        ([words(90)], {"length": 0}, "windows have at least 1 tokens, not 0"),
        ([words(90)], {"like": [""]}, "like has no tokens, and so no lengths to take"),
        ("nothing.txt", {}, "nothing.txt cannot be read: there is no such file or folder"),
    ],
)
def test_refused(tokenizer, source, options, message):
    with pytest.raises(InputError, match=message):
        mxcompile.calibration_batches(source, tokenizer, **options)


def test_a_source_of_another_type(tokenizer):
    with pytest.raises(ArgumentError, match="calibration_batches: source "):
        mxcompile.calibration_batches(3, tokenizer)  # pyright: ignore[reportArgumentType]


def test_chats_without_a_template(local_model):
    with pytest.raises(InputError, match="the calibration data, document 1 is a chat, and the tokenizer has no chat"):
        mxcompile.calibration_batches([CHAT], load_model(str(local_model))[1], length=4)


def test_batches_are_calibration_data(local_model, tokenizer):
    """Every recipe takes them as they are."""
    model = load_model(str(local_model))[0]
    batches = mxcompile.calibration_batches([words(600)], tokenizer, length=(8, 32), windows=20)
    recipe = "awq-fold{weight=mxint4,grid=1} | gptq{format=mxint4,activation=mxint8} | lower-mx{weight=mxint4}"
    quantized = mxcompile.quantize_and_compile(model, batches[0], recipe=recipe, calibration=batches, compile=False)
    assert mxcompile.evaluate(quantized, batches[-1]["input_ids"], model).kl > 0


def test_a_text_file_with_a_colon_in_its_name(tokenizer, tmp_path):
    path = Path(tmp_path / "a:3")
    path.write_text(words(40))
    (batch,) = mxcompile.calibration_batches(f"{path}:2", tokenizer, length=16)
    assert len(batch["input_ids"]) == 2
