"""compressed-tensors folders as vLLM reads them: the layers that it joins, and a folder with all that needs care."""

import ast
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import engines
import pytest
import torch
from served import Spec, quantized, tiny_llama

import mxcompile
from mxcompile.checkpoint.interop.joined_layers import JOINED
from mxcompile.tensor.weight import MXWeight

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
KNOWN_OTHERWISE = {("k_proj", "v_proj"), ("q_proj", "k_proj")}  # parts of q, k, v, which need one format anyway
MOST = 1.5  # times what two attentions of transformers differ by


def packed_modules() -> Iterator[tuple[str, ...]]:
    """The names of layers that a class of vLLM joins, in `packed_modules_mapping`; read, as an import takes minutes."""
    (package,) = find_spec("vllm").submodule_search_locations
    for path in (Path(package) / "model_executor" / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Assign | ast.AnnAssign) and "packed_modules_mapping" in ast.unparse(node)
            if named and isinstance(node.value, ast.Dict):
                for value in node.value.values:
                    if isinstance(value, ast.List) and all(isinstance(item, ast.Constant) for item in value.elts):
                        yield tuple(item.value for item in value.elts)


def test_the_layers_that_several_models_join_are_known():
    """Those that one model alone joins are found by data flow, if its parts read one tensor."""
    counts = Counter(parts for parts in packed_modules() if len(parts) > 1 and not any("." in part for part in parts))
    assert counts["q_proj", "k_proj", "v_proj"] > 50
    known = {frozenset(joined) for joined in JOINED}
    several = {parts for parts, count in counts.items() if count > 1} - KNOWN_OTHERWISE
    assert {parts for parts in several if frozenset(parts) not in known} == set()


def test_a_quantized_head_beside_layers_of_two_formats(tmp_path):
    """And a float layer: vLLM finds each by its path, the head too, whose class "Linear" does not match."""
    mxfp4, mxfp8 = Spec("mxfp4", None), Spec("mxfp8_e4m3", None)
    specs = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "layers.0.self_attn.o_proj"), mxfp4)
    model = quantized(tiny_llama(), specs | {"down_proj": mxfp8, "lm_head": mxfp4})
    assert not isinstance(model.model.layers[1].self_attn.o_proj.weight, MXWeight)
    mxcompile.save(model, tmp_path / "out", format="compressed-tensors")
    ids = engines.prompts()
    result = engines.run(tmp_path / "out", ids)
    measured = distance(torch.tensor(result["log_probabilities"]), engines.expected(model, ids))
    own = distance(engines.expected(model, ids, "eager"), engines.expected(model, ids))
    print(f"{measured:.5f} from transformers, whose attentions differ by {own:.5f}")
    assert measured <= MOST * own
    assert all(f"MXCompileMx{kind}LinearKernel" in result["printed"] for kind in ("Fp4", "fp8"))
    head = model.lm_head.weight.dequantize()
    model.lm_head.weight = torch.nn.Parameter(head + head.std() * torch.randn_like(head) / 20, requires_grad=False)
    assert distance(engines.expected(model, ids), torch.tensor(result["log_probabilities"])) > MOST * own


def distance(actual, expected) -> float:
    return (actual - expected).abs().mean().item()
