"""Which layers an engine may divide over several processes (tensor parallel), and in what dtype: reasons to refuse.

A column-parallel layer holds some rows of the weight and reads the whole input; a row-parallel one holds some columns,
which must be whole blocks, and reads that part of the input.
"""

import torch

from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.tensor.layout import MXLayout


def check_layer(layer: str, layout: MXLayout, size: int, shard: int) -> None:
    """Raise CheckpointError with the layer's name if it cannot be served with `shard` of its `size` inputs."""
    if layout.size != size:
        raise CheckpointError(f"{layer} has {layout.size} inputs in the checkpoint, the engine's has {size}")
    if layout.transposed:
        raise CheckpointError(
            f"{layer} is stored transposed (a Conv1D of GPT-2's kind), which cannot be served: load the model with "
            "mxcompile.load, or convert it to nn.Linear before quantizing it"
        )
    reason = None if shard == size else why_not_divided(layout, size, shard)
    if reason is not None:
        raise CheckpointError(
            f"{layer} cannot be divided over {size // shard} processes: {reason}. Serve with a smaller "
            "--tensor-parallel-size"
        )


def why_not_divided(layout: MXLayout, size: int, shard: int) -> str | None:
    """Why a process cannot hold `shard` of the `size` inputs of a row-parallel layer; None if it can."""
    block = parse_format(layout.format).block_size
    if shard % block:
        return f"its share of {size} inputs, {shard}, cuts a block of {block} values"
    rotation = layout.rotation or (layout.multiplier_shape[-1] if len(layout.multiplier_shape) > 1 else 1)
    if shard % rotation:
        return f"its share of {size} inputs, {shard}, cuts a rotation of {rotation} values"
    if layout.activation is None:
        return None
    activation = parse_format(layout.activation)
    if activation.aligned:
        return f"{activation} aligns a token to its largest value, and each process has only a part of the token"
    if shard % activation.block_size:
        return f"its share of {size} inputs, {shard}, cuts a block of {activation.block_size} values of its input"
    return None


def check_dtype(layer: str, dtype: torch.dtype, device_type: str) -> None:
    """Raise CheckpointError for float16 on a GPU: the kernels decode weights to bfloat16, which has more exponents."""
    if device_type != "cpu" and dtype == torch.float16:
        raise CheckpointError(f"{layer} cannot be served in float16, the kernels need bfloat16: add --dtype bfloat16")
