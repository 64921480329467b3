"""Triton kernels; they also run on a CPU in Triton's interpreter."""
