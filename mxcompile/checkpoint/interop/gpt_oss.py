"""Read gpt-oss checkpoints: experts in MXFP4, everything else as it is.

    experts.down_proj_blocks uint8 [E, out, in/32, 16], experts.down_proj_scales uint8 [E, out, in/32]
        -> experts.down_proj (MXWeight of [E, in, out], contracted along in)

A byte of the blocks holds an even element in its low nibble and the next element in its high nibble. Checked with
transformers' `convert_moe_packed_tensors`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from mxcompile.checkpoint.interop.element_layouts import from_rows
from mxcompile.checkpoint.interop.files import dtype_of, read_tensors
from mxcompile.errors import CheckpointError
from mxcompile.formats import MXFP4
from mxcompile.tensor.weight import MXLayout

METHOD: Final = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"


def read(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, elements and scales assembled to MXWeights.

    Raises CheckpointError if it is damaged, or not a gpt-oss model.
    """
    if config.get("model_type") != "gpt_oss":
        raise CheckpointError(
            f"{folder} holds a {config.get('model_type')} quantized by {METHOD!r}: of these mxcompile reads gpt_oss"
        )
    stored = read_tensors(folder)
    dtype = dtype_of(config, stored)
    tensors: dict[str, Tensor] = {}
    for name in [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]:
        blocks, scales = stored.pop(name + _BLOCKS), stored.pop(name + _SCALES, None)
        if scales is None or blocks.dim() != 4 or scales.dim() != 3 or blocks.shape[-1] != MXFP4.block_bytes:
            raise CheckpointError(
                f"{folder}: {name} has no scales, or its elements {list(blocks.shape)} are not MXFP4 blocks"
            )
        layout = MXLayout(str(MXFP4), 32 * scales.shape[-1], transposed=True)
        tensors[name] = from_rows(f"{folder}: {name}", blocks.flatten(-2), scales, MXFP4, layout, dtype)
    if not tensors:
        raise CheckpointError(f"{folder} says that it was quantized by {METHOD!r} but holds no MXFP4 blocks")
    return stored | tensors
