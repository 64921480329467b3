"""`MXWeight`, and operations on all tensors of a module."""

from mxcompile.tensor import operators as operators  # defines what torch does with an MXWeight
from mxcompile.tensor import pickling as pickling  # makes torch.load accept an MXWeight
