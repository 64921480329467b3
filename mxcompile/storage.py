"""How many bytes a module's tensors take."""

from torch import nn

from mxcompile.weight import MXWeight


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each tensor once; MX weights at their packed size."""
    total = 0
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        parts = tensor.parts if isinstance(tensor, MXWeight) else (tensor,)
        for part in parts:
            if part.data_ptr() not in seen:
                seen.add(part.data_ptr())
                total += part.numel() * part.element_size()
    return total
