"""compressed-tensors folders as vLLM reads them: the layers that it joins."""

import ast
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import engines
import pytest

from mxcompile.checkpoint.interop.joined_layers import JOINED

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
KNOWN_OTHERWISE = {("k_proj", "v_proj"), ("q_proj", "k_proj")}  # parts of q, k, v, which need one format anyway


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
