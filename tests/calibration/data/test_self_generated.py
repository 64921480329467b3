"""Text that the model writes itself: its first tokens, its ends, the same for a seed, and the same from its file."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build
from torch import Tensor, nn

import mxcompile
from mxcompile.calibration.data import self_generated
from mxcompile.calibration.data.self_generated import generate_documents
from mxcompile.cli.model_source import load_model
from mxcompile.errors import InputError


@pytest.fixture(scope="module")
def loaded(local_model) -> tuple[Any, Any]:
    """The tokenizer has 12 tokens, and the model knows 128: it must write those of the tokenizer alone."""
    return load_model(str(local_model))


def ids(batches: list[mxcompile.WeightedBatch]) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


def test_the_same_for_a_seed(loaded):
    """Whatever torch's generators have drawn before, which stay as they are."""
    first = ids(mxcompile.generate_calibration(*loaded, windows=6, length=24))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = ids(mxcompile.generate_calibration(*loaded, windows=6, length=24))
    other = ids(mxcompile.generate_calibration(*loaded, windows=6, length=24, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (6, 24)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first < 12).all()


def test_it_is_saved_for_reuse(loaded, tmp_path):
    """The file gives the same batches; with another tokenizer, its text counts."""
    path = tmp_path / "folder" / "own.jsonl"
    batches = mxcompile.generate_calibration(*loaded, windows=5, length=24, out=path)
    again = mxcompile.calibration_batches(path, loaded[1], length=24, windows=5)
    assert torch.equal(ids(batches), ids(again))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(loaded[1].decode(row["input_ids"]) == row["text"] for row in rows)
    path.write_text("".join(json.dumps(row | {"text": "The capital " * 60}) + "\n" for row in rows))
    assert set(ids(mxcompile.calibration_batches(path, loaded[1], length=24)).flatten().tolist()) == {2, 3}
    with pytest.raises(InputError, match=r"own.jsonl exists already"):
        mxcompile.generate_calibration(*loaded, out=path)
    with pytest.raises(InputError, match=r"own.txt: the model's own text is saved in a .jsonl file"):
        mxcompile.generate_calibration(*loaded, out=tmp_path / "own.txt")


class Counting(nn.Module):
    """Writes 5, 6, 7, ... after a first token, and ends with 1 at position 10; asked how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=12))
        self.generation_config = SimpleNamespace(eos_token_id=[1])
        self.calls: list[dict[str, Any]] = []

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        self.calls.append(options | {"begun": input_ids.clone(), "training": self.training})
        more = torch.arange(options["max_new_tokens"]).expand(len(input_ids), -1) % 4 + 5
        ids = torch.cat([input_ids, more], 1)
        ids[:, 10:] = 1
        return ids


def test_the_recipe(loaded):
    """A first token, three greedy ones, the rest sampled by the model's plain distribution, up to its end."""
    model = Counting().train()
    documents = generate_documents(model, loaded[1], tokens=30, length=20, seed=0)
    greedy, sampled = model.calls[:2]
    assert [document[1:] for document in documents] == [[5, 6, 7, 5, 6, 7, 8, 5, 6, 1]] * 3
    assert (greedy["do_sample"], greedy["max_new_tokens"], greedy["min_new_tokens"]) == (False, 3, 3)
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_k"], sampled["top_p"]) == (True, 1.0, 0, 1.0)
    assert sampled["begun"].shape[1] == 4
    assert sampled["max_new_tokens"] == 16
    assert not greedy["training"]
    assert model.training


def test_first_tokens(loaded):
    """No special tokens and no parts of characters; frequent ones, which stand first in a vocabulary, more often."""
    weights = self_generated._first_token_weights(loaded[1], Counting())
    assert weights[:2].tolist() == [0, 0]
    assert (weights[2:] > 0).all()
    assert weights[2] > weights[11]


def test_models_that_write_nothing(loaded):
    with pytest.raises(InputError, match="MLP cannot write calibration text: it has no generate method"):
        mxcompile.generate_calibration(build("mlp"), loaded[1])
    nothing = SimpleNamespace(
        batch_decode=lambda ids: [" "] * len(ids), all_special_ids=[], added_tokens_decoder={}, __len__=lambda: 3
    )
    empty = type("Empty", (), {**vars(nothing), "__len__": lambda self: 3, "batch_decode": lambda self, ids: [" "] * 3})
    with pytest.raises(InputError, match="the tokenizer has no token that a text could begin with"):
        self_generated._first_token_weights(empty(), Counting())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(loaded):
    model, tokenizer = loaded[0].to("cuda"), loaded[1]
    one, other = (mxcompile.generate_calibration(model, tokenizer, windows=3, length=24) for _ in range(2))
    assert torch.equal(ids(one), ids(other))
    assert ids(one).is_cuda
    model.to("cpu")
