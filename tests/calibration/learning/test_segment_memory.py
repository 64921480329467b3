"""How much memory the weights of a segment take while they are trained."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.calibration.learning.segment_training import SegmentTraining
from mxcompile.pipeline.pipeline import Pipeline


def peak(run):
    """The most bytes that were allocated at a time within a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_takes_16_bytes_in_training(dtype, monkeypatch):
    """Latent and offset, 8 bytes, are there before; then come the rounded weight and its gradient. In 16 bits these are
    4 bytes, but a part of the weights has a gradient in float32 already."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).to(dtype).eval()
    batches = [{"input_ids": torch.randint(64, (1, 4))} for _ in range(4)]
    plain, bytes_of_a_weight = SegmentTraining.train, list[float]()

    def measured(training):
        count = sum(weight.parameter.numel() for weight in training._weights.values())
        assert all(weight._latent.numel() == weight.parameter.numel() for weight in training._weights.values())
        losses = []
        bytes_of_a_weight.append(8 + peak(lambda: losses.append(plain(training))) / count)
        return losses[0]

    monkeypatch.setattr(SegmentTraining, "train", measured)
    program = mxcompile.trace(model, batches[0])
    Pipeline.parse("learn-rounding{format=mxfp4,steps=4}").run(program, batches)
    assert len(bytes_of_a_weight) >= 2
    assert all(12 < each < 16.2 for each in bytes_of_a_weight)  # activations of four tokens are beside
