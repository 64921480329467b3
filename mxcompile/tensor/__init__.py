"""`MXWeight`, and operations on all tensors of a module."""

from mxcompile.tensor import pickling as pickling  # makes torch.load accept an MXWeight
