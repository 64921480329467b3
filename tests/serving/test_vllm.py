"""Engines of vLLM on tiny checkpoints: log-probabilities of prompts, against transformers.

Two correct implementations of one model differ: by the order of additions, and where inputs are rounded to MX, an ulp
becomes a step of the format. How much, is what transformers' own two implementations of attention differ by, on the
same checkpoint. An engine may differ by `MOST` times that.
"""

import copy
import shutil
from pathlib import Path

import engines
import pytest
import torch
from served import with_float_inputs
from torch import Tensor, nn

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
IDS = engines.prompts()
MOST = 1.5
MOST_OF_FLOAT = 3  # times the distance of the float model, for layers whose inputs are not rounded
COMPILED = {"enforce_eager": False}


def distance(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().mean().item()


def own_distance(model: nn.Module) -> float:
    return distance(engines.expected(model, IDS, "eager"), engines.expected(model, IDS))


def check(kind: str, actual: Tensor, model: nn.Module) -> float:
    """The distance of an engine's results from transformers'; fails if it is too large."""
    measured, own = distance(actual, engines.expected(model, IDS)), own_distance(model)
    print(f"{kind}: {measured:.5f} from transformers, whose attentions differ by {own:.5f}")
    assert measured <= MOST * own
    return measured


@pytest.fixture(scope="module")
def float_distance(checkpoint) -> float:
    folder, model = checkpoint("float")
    return check("float", engines.log_probabilities(folder, IDS), model)


@pytest.mark.parametrize("kind", ["w4a8", "w4a16", "mixed", "prepared", "tied"])
def test_own_checkpoints(kind, checkpoint, float_distance):
    """w4a16 has a quantized head; w4a16 and mixed have biases; prepared has multipliers and rotations."""
    folder, model = checkpoint(kind)
    measured = check(kind, engines.log_probabilities(folder, IDS), model)
    assert kind != "w4a16" or measured <= MOST_OF_FLOAT * float_distance


def test_two_processes_share_every_layer(checkpoint, float_distance):
    """Fused rows of q, k, v and of gate, up; blocks of o and down, with a bias that is added once; the head's rows."""
    folder, model = checkpoint("w4a16")
    values = engines.log_probabilities(folder, IDS, tensor_parallel_size=2)
    assert check("w4a16, two processes", values, model) <= MOST_OF_FLOAT * float_distance


def test_inputs_are_rounded_as_the_checkpoint_says(checkpoint):
    """What the comparison would say of an engine that ignores the formats of activations."""
    model = checkpoint("mixed")[1]
    ignorant = engines.expected(with_float_inputs(copy.deepcopy(model)), IDS)
    assert distance(ignorant, engines.expected(model, IDS)) > MOST * own_distance(model)


def test_compiled_graphs_of_one_shape_are_not_shared_between_formats(checkpoint):
    """Both engines have one cache, and their models the same class and sizes."""
    for kind in ("w4a8", "w8a8"):
        folder, model = checkpoint(kind)
        check(f"{kind}, compiled", engines.log_probabilities(folder, IDS, **COMPILED), model)
    assert any((Path(engines.vllms_cache().name) / "torch_compile_cache").iterdir())


@pytest.mark.parametrize("kind", ["stock mxfp4", "stock mxfp8", "stock mixed"])
def test_folders_of_compressed_tensors_run_on_our_kernel(kind, checkpoint, float_distance):
    """By their weights alone: vLLM has no other kernel on a CPU, and activations stay float as on a GPU."""
    folder, model = checkpoint(kind)
    result = engines.run(folder, IDS, settings=engines.OUR_KERNELS)
    assert "MXCompileMx" in result["printed"]
    model = with_float_inputs(copy.deepcopy(model))
    measured = check(kind, torch.tensor(result["log_probabilities"]), model)
    assert measured <= MOST_OF_FLOAT * float_distance


def test_parts_of_a_fused_layer_that_differ_are_refused(checkpoint):
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn\.qkv_proj cannot be served: the engine"):
        engines.run(checkpoint("unequal")[0], IDS)


def test_a_damaged_tensor_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("w4a8")[0], folder)
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"safetensors is damaged \(.* has changed since it was written\)"):
        engines.run(folder, IDS)
