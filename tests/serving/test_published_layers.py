"""Engines know the published names of tensors; our files have those of transformers' modules."""

import pytest
from interop_mixtures import mixture, quantized_mixture
from safetensors.torch import load_file

import mxcompile
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.serving.published_layers import patterns, renamed_tensors
from mxcompile.serving.stored_experts import tensors_of


def mapped(name, renamings):
    for pattern, replacement in renamings.items():
        name = pattern.sub(replacement, name)
    return name


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "granite"])
def test_all_but_experts_get_the_names_that_transformers_saves(name, tmp_path):
    mxcompile.save(quantized_mixture(name, num_hidden_layers=2), tmp_path / "model")
    mixture(name, num_hidden_layers=2).save_pretrained(tmp_path / "float")
    published = set(load_file(tmp_path / "float" / "model.safetensors"))
    checkpoint = Checkpoint(tmp_path / "model")
    renamings = patterns(renamed_tensors(checkpoint))
    names = checkpoint.names
    own = {*names.plain, *names.weights} - tensors_of(names) - names.non_persistent
    actual = {mapped(each, renamings) for each in own}
    assert actual <= published
    assert all("expert" in each or "_linear" in each for each in published - actual)
    assert bool(renamings) == (name != "gpt-oss")
    for each in names.weights:
        for part in ("scales", "multiplier"):
            assert mapped(f"{each}.{part}", renamings) == f"{mapped(each, renamings)}.{part}"


def test_patterns_of_all_layers_are_one_and_match_whole_names():
    renamed = {f"layers.{n}.mlp.gate.weight": f"layers.{n}.moe.gate.weight" for n in range(12)} | {"a.0.b": "c.b"}
    renamings = patterns(renamed)
    assert len(renamings) == 2
    assert mapped("layers.11.mlp.gate.weight", renamings) == "layers.11.moe.gate.weight"
    assert mapped("layers.11.mlp.gate.weight.scales", renamings) == "layers.11.moe.gate.weight.scales"
    assert mapped("a.0.b", renamings) == "c.b"
    for other in (
        "x.layers.1.mlp.gate.weight",
        "layers.1.mlp.gate.weights",
        "layers.1.mlp.gate.weight.scales2",
        "a-0.b",
    ):
        assert mapped(other, renamings) == other
