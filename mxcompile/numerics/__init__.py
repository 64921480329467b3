"""What MX means, in plain PyTorch: the reference, packing, rounding, Hadamard rotations, error metrics."""
