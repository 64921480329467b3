"""Private names of torch and transformers used outside of `inductor/private_api.py`: one list, held both ways.

Checked with torch 2.11, 2.13 and 2.14, and transformers 5.17, 5.23 and 5.24. A name that is not in the list fails the
first test; one that a new torch lacks fails the second.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from rooms import PRODUCT, ROOT
from torch import Tensor, nn
from torch.fx import Graph

PRIVATE_API = ROOT / "mxcompile/inductor/private_api.py"
GLUON = {"_reinterpret": "of shared memory in Gluon, which only Hopper runs: see `hopper.NO_GLUON`"}
OPERATOR = torch.ops.aten.linear.default
NAMES = {
    "torch._ops": (torch, "where OpOverload and OpOverloadPacket are defined"),
    "torch._check": (torch, "documented: what a size must be"),
    "torch._C": (torch, "DisableTorchFunctionSubclass, documented for subclasses"),
    "torch._grouped_mm": (torch, "what F.grouped_mm calls"),
    "torch._subclasses.fake_tensor": (torch._subclasses, "FakeTensorMode, documented for tracing without values"),
    "torch.utils._pytree": (torch.utils, "trees of a call's arguments and results"),
    "_make_wrapper_subclass": (Tensor, "documented for wrapper subclasses"),
    "_version": (torch.zeros(1), "changes with each write into a tensor"),
    "_disabled_torch_function_impl": (torch._C, "a subclass of Tensor that functions of torch take as a plain tensor"),
    "_base": (torch.zeros(1), "what a tensor is a view of"),
    "_schema": (OPERATOR, "an operator's arguments by name"),
    "_codegen": (Graph(), "set_codegen is public, a getter is not"),
    "_call_impl": (nn.Module(), "a module's call, with hooks"),
    "_compiled_call_impl": (nn.Module(), "what module.compile() sets"),
    "_parameters": (nn.Module(), "a module's own parameters"),
    "_buffers": (nn.Module(), "a module's own buffers"),
    "_modules": (nn.Module(), "a module's own children"),
    "_forward_pre_hooks": (nn.Module(), "a module's own hooks"),
    "_forward_pre_hooks_with_kwargs": (nn.Module(), "those of them that take keyword arguments"),
    "_non_persistent_buffers_set": (nn.Module(), "buffers outside of the state dict"),
}
GENERATION = {
    "_sample": "input_ids logits_processor stopping_criteria generation_config synced_gpus streamer model_kwargs",
    "_prefill": "input_ids generation_config model_kwargs is_first_iteration",
    "_update_model_kwargs_for_generation": "outputs model_kwargs is_encoder_decoder num_new_tokens",
    "_optimize_model_for_decode": "",
    "_prepare_generation_config": "generation_config kwargs",
    "_prepare_cache_for_generation": "generation_config model_kwargs generation_mode batch_size max_cache_length",
    "_get_candidate_generator": "generation_config input_ids inputs_tensor logits_processor model_kwargs "
    "assistant_model target_tokenizer assistant_tokenizer",
}
OPTIONAL = {
    "_empty_nn_module_stack_from_metadata_hook": "what torch.export writes for the lack of a module path",
    "_orig_mod": "a compiled module's name for the original in its state dict",
    "_dynamo_source": "of the inputs of a Dynamo graph; without it nothing is lost but static addresses",
    "_param_name_to_source": "of a Dynamo graph module, read by AOTAutograd",
    "_keys_to_ignore_on_load_unexpected": "of a PreTrainedModel",
    "_skip_keys_device_placement": "of a PreTrainedModel: arguments that accelerate does not move between devices",
    "_apply_gate": "of transformers' experts: the activation between the two matmuls; without it no `mx::experts`",
    "_compiled_call": "where transformers' generate caches the compiled decode step",
    "_last_compile_config": "where transformers' generate keeps the config of that step",
    "_attn_implementation": "of a transformers config",
    "_eos_token_tensor": "of a generation config that generate has prepared",
    "_pad_token_tensor": "of a generation config that generate has prepared",
    **dict.fromkeys(GENERATION, "a part of transformers' generate; a model whose own it is decodes in that loop"),
}


def used(path: Path) -> set[str]:
    """Private attributes of foreign objects, and private modules and names that a file imports; not operators."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("mxcompile"):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            names |= {f"{node.module}.{name}" for name in private}
            names |= {str(node.module)} if any(part.startswith("_") for part in str(node.module).split(".")) else set()
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "aten", "torch.ops.aten"):
                names.add(f"torch.{node.attr}" if owner == "torch" else node.attr)
        elif isinstance(node, ast.Constant) and str(node.value) in {*NAMES, *OPTIONAL}:
            names.add(str(node.value))
    return names


def ours() -> set[str]:
    """Private names that this project defines."""
    names: set[str] = set()
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and "self" in ast.unparse(node):
                names.add(node.attr)
    return names


def test_every_private_name_is_listed_and_every_listed_one_is_used():
    found = set().union(*(used(path) for path in PRODUCT if path != PRIVATE_API)) - (ours() - {*NAMES, *OPTIONAL})
    others = {"lm_eval.__main__"}  # its documented command
    assert found - others == {*NAMES, *OPTIONAL, *GLUON}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there(name):
    owner, _ = NAMES[name]
    assert hasattr(owner, name.rpartition(".")[2])


def test_generate_caches_its_compiled_step_where_we_put_ours():
    models = pytest.importorskip("transformers.modeling_utils")
    source = inspect.getsource(models.PreTrainedModel.get_compiled_call)
    assert "self._compiled_call" in source
    assert "self._last_compile_config" in source


@pytest.mark.parametrize("name", GENERATION)
def test_a_part_of_generate_takes_what_we_pass(name):
    mixin = pytest.importorskip("transformers").GenerationMixin
    assert list(inspect.signature(getattr(mixin, name)).parameters) == ["self", *GENERATION[name].split()]
