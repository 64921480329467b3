"""Layers that vLLM runs as one, and whether each of them has the same format.

    q_proj, k_proj, v_proj: x @ q.T, x @ k.T, x @ v.T -> x @ [q; k; v].T

vLLM's own models join layers under names that recur in most architectures (`packed_modules_mapping`). Its backend for
other models of transformers joins linears of one module that read one tensor, whatever their names are. Either fails
while it loads, or computes wrongly, if the parts are in different formats or if some of them are float.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.tensor.modules import is_pretrained

JOINED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("c_fc_0", "c_fc_1"),
    ("w1", "w3"),
)
"""Last names of layers that models of vLLM join."""
_EXPERTS: Final = ".experts."


def different_by_name(formats: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(reason, layers) for layers of different formats whose names say that vLLM runs them as one.

    formats: the format of each layer, by the path under which it is stored.
    """
    joined_formats: dict[str, dict[str, str]] = {}
    for path, fmt in formats.items():
        parent, _, leaf = path.rpartition(".")
        for joined in JOINED:
            if leaf in joined:
                joined_formats.setdefault(f"{parent}: {', '.join(joined)}", {})[leaf] = fmt
        if _EXPERTS in path:
            joined_formats.setdefault(f"{path.partition(_EXPERTS)[0]}.experts", {})[leaf] = fmt
    for layers, of_each in joined_formats.items():
        if len(set(of_each.values())) > 1:
            yield f"vLLM runs these layers as one and needs one format for them, not {_listed(of_each)}", layers


def different_by_data_flow(module: nn.Module, formats: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(reason, layers) for linears of different formats that read one tensor and have names of their own.

    module: a model; only those of transformers are looked at, which vLLM runs. formats: the format of each Linear, by
    its path in the module. The model is run on the meta device, without values, if such layers differ at all.
    """
    children: dict[str, dict[str, str]] = {}
    for path, fmt in formats.items():
        parent, _, leaf = path.rpartition(".")
        children.setdefault(parent, {})[leaf] = fmt
    mixed = {parent: of_each for parent, of_each in children.items() if len(set(of_each.values())) > 1}
    if not mixed or not is_pretrained(module):
        return
    try:
        groups = shared_inputs(module)
    except Exception as error:  # a model's forward may raise anything
        yield from _undecided(mixed, f"{type(module).__name__} does not run without values ({error})")
        return
    for parent, leaves in groups:
        of_each = {leaf: mixed[parent][leaf] for leaf in leaves if leaf in mixed.get(parent, {})}
        if len(set(of_each.values())) > 1 and not _refused_by_name(of_each):
            reason = "vLLM may run these layers as one, as they read the same input, and then needs one format for them"
            yield f"{reason}, not {_listed(of_each)}", f"{parent}: {', '.join(of_each)}"


def _undecided(mixed: Mapping[str, Mapping[str, str]], why: str) -> Iterator[tuple[str, str]]:
    """The same of all layers in modules that have none of the familiar names."""
    for parent, of_each in mixed.items():
        if not any(set(joined) <= set(of_each) for joined in JOINED):
            reason = "vLLM may run layers that read the same input as one, and then needs one format for them"
            yield f"{reason}, not {_listed(of_each)}; {why}, so that mxcompile cannot tell which these are", parent


def shared_inputs(module: Any) -> list[tuple[str, list[str]]]:
    """(path of a module, names of its Linears that read one tensor) for each two or more, in a model of transformers.

    A model of the same class and configuration runs on the meta device, on the example that transformers has for it.
    Raises whatever its forward raises there.
    """
    readers: dict[tuple[str, int], list[str]] = {}
    alive: list[Tensor] = []  # so that no two inputs have one id
    with torch.device("meta"):
        empty = type(module)(module.config).to(torch.bfloat16).eval()

    def record(parent: str, leaf: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        alive.append(args[0])
        leaves = readers.setdefault((parent, id(args[0])), [])
        if leaf not in leaves:
            leaves.append(leaf)

    for path, layer in empty.named_modules():
        if isinstance(layer, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            layer.register_forward_pre_hook(partial(record, parent, leaf))
    with torch.no_grad():
        empty(**{name: value.to("meta") for name, value in empty.dummy_inputs.items()})
    return [(parent, leaves) for (parent, _), leaves in readers.items() if len(leaves) > 1]


def _refused_by_name(formats: Mapping[str, str]) -> bool:
    return any(len({formats[leaf] for leaf in joined if leaf in formats}) > 1 for joined in JOINED)


def _listed(formats: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {fmt}" for name, fmt in formats.items())
