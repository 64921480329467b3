"""Evaluation: perplexity and divergence of models with known values."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from models import LANGUAGE_MODELS, VOCABULARY, build
from torch import Tensor, nn

from mxcompile.diagnostics.evaluation import Evaluation, Metric, check_causal, evaluate
from mxcompile.errors import InputError, UnknownNameError

examples = settings(derandomize=True, deadline=None, database=None, max_examples=50)
FLOAT32 = 1e-6  # relative rounding of a float32 sum of a few hundred terms of one size


class Uniform(nn.Module):
    """All tokens equally likely, however large the logits."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=torch.full((*input_ids.shape, VOCABULARY), 7.0))


class Successor(nn.Module):
    """Predicts n + 1 after n: log-probability about 0 for it, -`sureness` for all others."""

    def __init__(self, sureness: float = 100.0) -> None:
        super().__init__()
        self.sureness = sureness

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        following = (input_ids + 1) % VOCABULARY
        return SimpleNamespace(logits=nn.functional.one_hot(following, VOCABULARY).float() * self.sureness)


def windows(count: int = 3, length: int = 16) -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (count, 1, length)))


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    result = evaluate(Uniform(), windows(3, 16))
    assert result.tokens == 3 * 15
    assert result.perplexity == pytest.approx(VOCABULARY, rel=FLOAT32)
    assert (result.kl, result.top1) == (None, None)


def test_every_token_is_predicted_from_those_before_it():
    counting = torch.arange(20).unsqueeze(0)
    assert evaluate(Successor(), [counting]).nll == 0.0
    assert evaluate(Successor(), [counting.flip(-1)]).nll == pytest.approx(100.0, rel=FLOAT32)


def test_mean_over_tokens_not_over_windows():
    right, wrong = torch.arange(31).unsqueeze(0), torch.tensor([[5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]])
    result = evaluate(Successor(), [right, wrong])
    assert result.tokens == 40
    assert result.nll == pytest.approx(100.0 * 10 / 40, rel=FLOAT32)
    result = evaluate(Successor(), [right, wrong], Uniform())
    assert result.top1 == 0.0  # the most likely token of a uniform model is 0, which no window counts up to
    assert result.kl == pytest.approx(100.0 * (1 - 1 / VOCABULARY) - math.log(VOCABULARY), rel=FLOAT32)


def test_long_windows_are_scored_in_parts():
    long = torch.arange(1300).unsqueeze(0) % VOCABULARY
    result = evaluate(Successor(), [long], Successor())
    assert (result.tokens, result.nll, result.kl, result.top1) == (1299, 0.0, 0.0, 1.0)


def test_a_model_against_itself():
    model = build("llama")
    result = evaluate(model, windows(2), model)
    assert (result.kl, result.top1) == (0.0, 1.0)
    assert result.nll > 0


def test_a_model_against_another():
    result = evaluate(Successor(), [torch.arange(20).unsqueeze(0)], Successor(-100.0))
    assert result.top1 == 0.0
    assert result.kl > 50.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_half_precision_are_scored_in_float32(dtype):
    class Half(Uniform):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(input_ids, use_cache).logits.to(dtype))

    assert evaluate(Half(), windows()).perplexity == pytest.approx(VOCABULARY, rel=FLOAT32)


def test_no_gradients():
    class Watching(Uniform):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not torch.is_grad_enabled()
            return super().forward(input_ids, use_cache)

    evaluate(Watching(), windows(1), Watching())


@pytest.mark.parametrize("nothing", [[], [torch.zeros(1, 1, dtype=torch.long)]], ids=["no windows", "one token"])
def test_nothing_to_predict(nothing):
    with pytest.raises(InputError, match="nothing to evaluate: every window has fewer than two tokens"):
        evaluate(Uniform(), nothing)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(Uniform(), nothing, Uniform())


def test_a_window_of_one_token_counts_nothing():
    (window,) = windows(1)
    short = torch.zeros(1, 1, dtype=torch.long)
    assert evaluate(Uniform(), [window, short], Successor()) == evaluate(Uniform(), [window], Successor())


def test_a_batch_scores_as_its_rows():
    model, other = build("llama"), build("gpt2")
    rows = windows(3)
    batch, single = (evaluate(model, given, other) for given in ([torch.cat(rows)], rows))
    assert batch.tokens == single.tokens == 3 * 15
    assert (batch.nll, batch.kl, batch.top1) == pytest.approx((single.nll, single.kl, single.top1), rel=1e-5)
    assert evaluate(model, torch.cat(rows), other) == single


def test_the_reference_is_scored_too():
    model, other = build("llama"), build("gpt2")
    result = evaluate(model, windows(), other)
    torch.manual_seed(0)
    assert result.reference_nll == evaluate(other, windows()).nll
    assert result.reference_perplexity == math.exp(result.reference_nll)


def test_a_row_is_no_window():
    with pytest.raises(InputError, match=r"a window is \[batch, length\], not \[8\]"):
        evaluate(Uniform(), [torch.zeros(8, dtype=torch.long)])
    with pytest.raises(InputError, match=r"a window is \[batch, length\]"):
        evaluate(Uniform(), torch.zeros(8, dtype=torch.long))


def test_windows_go_to_the_device_of_the_model():
    class Elsewhere(Uniform):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert input_ids.device.type == "meta"
            return super().forward(torch.empty(input_ids.shape), use_cache)

    assert evaluate(Elsewhere(), windows()).perplexity == pytest.approx(VOCABULARY, rel=FLOAT32)


def test_a_model_in_training_is_evaluated_without_dropout_and_left_in_training():
    class Dropping(Successor):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.frozen = nn.Dropout(0.5).eval()

        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.dropout(super().forward(input_ids, use_cache).logits))

    model = Dropping()
    assert evaluate(model, [torch.arange(100).unsqueeze(0)]).nll == 0.0
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


class Answering(nn.Module):
    """Returns a fixed output."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, input_ids: Tensor, use_cache: bool) -> object:
        return self.output


@pytest.mark.parametrize(
    "output",
    [torch.zeros(1, 16, 8), SimpleNamespace(logits=None), SimpleNamespace(logits=torch.zeros(1, 2))],
    ids=["a tensor", "none", "a classifier's"],
)
def test_no_logits(output):
    with pytest.raises(InputError, match="Answering is not a causal language model: it returns no logits"):
        evaluate(Answering(output), windows())
    with pytest.raises(InputError, match="Answering is not a causal language model"):
        evaluate(Uniform(), windows(), Answering(output))


def test_a_model_that_fails_is_named():
    with pytest.raises(
        InputError, match=r"MLP fails on token ids \[1, 16\]: .*unexpected keyword argument 'input_ids'"
    ):
        evaluate(build("mlp"), windows())
    with pytest.raises(InputError, match=r"GPT2LMHeadModel fails on token ids \[1, 100\]: index out of range"):
        evaluate(build("gpt2"), windows(1, 100))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_logit_is_said(value):
    logits = torch.zeros(1, 16, VOCABULARY)
    logits[0, 3, 5] = value
    bad = Answering(SimpleNamespace(logits=logits))
    for models in ([bad], [bad, Uniform()], [Uniform(), bad]):
        with pytest.raises(InputError, match="Answering returns NaN or infinite logits"):
            evaluate(models[0], windows(1), *models[1:])


def test_tokens_that_both_models_rule_out_count_nothing():
    logits = torch.zeros(1, 16, VOCABULARY)
    logits[..., VOCABULARY // 2 :] = -math.inf
    half = Answering(SimpleNamespace(logits=logits))
    result = evaluate(half, [torch.zeros(1, 16, dtype=torch.long)], half)
    assert result.perplexity == pytest.approx(VOCABULARY // 2, rel=FLOAT32)
    assert result.kl == 0.0


def test_vocabularies_must_be_the_same():
    small = Answering(SimpleNamespace(logits=torch.zeros(1, 16, 100)))
    with pytest.raises(InputError, match=f"cannot be compared: their vocabularies have {VOCABULARY} and 100 tokens"):
        evaluate(Uniform(), windows(1), small)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_causal_models(name):
    (window,) = windows(1)
    check_causal(build(name), window)
    check_causal(build(name).bfloat16(), window)


def test_a_model_that_sees_later_tokens():
    class Backwards(Successor):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return super().forward(input_ids.flip(-1), use_cache)

    with pytest.raises(InputError, match="Backwards is not a causal language model: its predictions depend on"):
        check_causal(Backwards(), *windows(1))


def test_perplexity():
    assert Evaluation(10, 0.0).perplexity == 1.0
    assert Evaluation(10, 1000.0).perplexity == math.inf
    assert Evaluation(10, math.log(50)).perplexity == pytest.approx(50, rel=1e-12)


class Masked(Successor):
    """Also takes a mask; without one it predicts badly."""

    def forward(self, input_ids: Tensor, use_cache: bool, attention_mask: Tensor | None = None) -> SimpleNamespace:
        output = super().forward(input_ids, use_cache)
        return output if attention_mask is not None else SimpleNamespace(logits=-output.logits)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tokens_that_a_mask_hides_are_not_scored(dtype):
    """On either side; the first visible token has nothing before it."""
    ids = torch.tensor([[4, 5, 6, 0, 0, 0], [9, 9, 3, 4, 5, 6], [7, 8, 8, 8, 8, 8]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6]).to(dtype)
    window = {"input_ids": ids, "attention_mask": mask}
    result = evaluate(Masked(), [window], Masked(50.0))
    assert (result.tokens, result.nll, result.top1) == (5, 0.0, 1.0)
    assert evaluate(Masked(), window).tokens == 5
    with pytest.raises(InputError, match="every window has fewer than two tokens"):
        evaluate(Masked(), [{"input_ids": ids, "attention_mask": mask & False}, ids[:, :1]])
    with pytest.raises(InputError, match=r"the attention_mask of a window is \[3, 5\], its input_ids are \[3, 6\]"):
        evaluate(Masked(), {"input_ids": ids, "attention_mask": mask[:, 1:]})
    with pytest.raises(InputError, match="a window has input_ids and maybe an attention_mask, not pixel_values"):
        evaluate(Masked(), {"pixel_values": ids})


def test_recovery_is_one_without_a_loss_and_falls():
    same = Evaluation(100, nll=3.0, kl=0.0, top1=1.0, reference_nll=3.0)
    worse = Evaluation(100, nll=3.5, kl=0.25, top1=0.75, reference_nll=3.0)
    assert [same.recovery(metric) for metric in Metric] == [1.0, 1.0, 1.0]
    assert [worse.recovery(metric) for metric in Metric] == pytest.approx([0.75, math.exp(-0.5), math.exp(-0.25)])
    assert worse.recovery() == worse.recovery("top1")
    with pytest.raises(UnknownNameError, match=r"unknown metric 'bleu': known: kl, perplexity, top1"):
        worse.recovery("bleu")
    with pytest.raises(InputError, match="recovery needs a reference"):
        Evaluation(100, nll=3.0).recovery()
