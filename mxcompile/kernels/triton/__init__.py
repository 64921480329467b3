"""Triton kernels; also run by Triton's interpreter on a CPU."""
