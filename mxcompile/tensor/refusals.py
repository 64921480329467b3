"""What an `MXWeight` says when it is taken for a float tensor."""

from collections.abc import Sequence


def not_defined(operator: str) -> str:
    """For an operator of torch, by its name: `aten.add_.Tensor`, `baddbmm`."""
    if operator.startswith(("baddbmm", "aten.baddbmm.", "aten.add.")):
        return (
            f"{operator} is not defined on an MXWeight: to add an adapter's product to the weight itself, as peft's "
            "target_parameters does, call dequantize() of the transformers model first; peft's target_modules keeps "
            "linears quantized"
        )
    if operator.split(".")[1:2] and operator.split(".")[1].endswith("_"):
        return (
            f"{operator} is not defined on an MXWeight and would change it in place, as merging an adapter does: call "
            "mxcompile.merge_adapters(model), which rounds the sum again, or dequantize() of the transformers model "
            "before the merge"
        )
    return (
        f"{operator} is not defined on an MXWeight, which supports only matmuls (as right operand) and embeddings; use "
        "weight.dequantize() for the float values, or dequantize() of a transformers model for a float model"
    )


def no_storage(shape: Sequence[int], fmt: str) -> str:
    """For numpy, safetensors, and libraries that write weights with them or offload them to disk."""
    return (
        f"an MXWeight ({list(shape)}, {fmt}) has no float storage to write to a file or to offload to disk: save the "
        "model with mxcompile.save or its save_pretrained, a state dict with torch.save; use weight.dequantize() for "
        "the float values"
    )


def float_into(shape: Sequence[int], fmt: str) -> str:
    """For values that are copied into one, as `load_state_dict` does with those of a float model."""
    return (
        f"float values cannot be copied into an MXWeight ({list(shape)}, {fmt}): load them into the float model and "
        "quantize that again; to replace the weight by a float one, load_state_dict(..., assign=True), or assign an "
        "nn.Parameter to the module's attribute"
    )


def forward_mode(shape: Sequence[int], fmt: str) -> str:
    """For an input with a tangent, as torch.func.jvp gives it one."""
    return (
        f"forward-mode derivatives (torch.func.jvp and jacfwd, torch.autograd.forward_ad) do not pass an MXWeight "
        f"({list(shape)}, {fmt}): take the reverse mode (torch.autograd.grad), or a float model with "
        "weight.dequantize() in the place of the weight"
    )
